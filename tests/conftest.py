# SPDX-License-Identifier: Apache-2.0
"""For all tests: Hypothesis has no deadline of its own. A machine that is busy with labs is no defect of an example."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("sevchaos", deadline=None)
settings.load_profile("sevchaos")
