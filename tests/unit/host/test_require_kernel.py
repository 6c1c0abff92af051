# SPDX-License-Identifier: Apache-2.0
"""On which kernels an experiment is carried out."""

from __future__ import annotations

import pytest

from chaos.errors import Unsupported
from chaos.safety.survey import require_kernel


@pytest.mark.parametrize("kernel", ["7.2.0", "7.2.13", "7.3.4", "7.10.1", "7.11-rc2"])
def test_one_within_the_bounds_is_taken(kernel: str) -> None:
    require_kernel(kernel, "7.2", "7.11", "they differ")
    require_kernel(kernel, "7.2", "", "they differ")
    require_kernel(kernel, "", "7.11", "they differ")
    require_kernel(kernel, "", "", "they differ")


@pytest.mark.parametrize("kernel", ["6.12.117", "7.1.99", "7.2-rc7"])
def test_one_that_is_older_is_not(kernel: str) -> None:
    with pytest.raises(Unsupported, match=f"kernel {kernel} is older than 7.2: they differ"):
        require_kernel(kernel, "7.2", "", "they differ")


@pytest.mark.parametrize("kernel", ["7.2.0", "7.2.13", "7.10.1", "8.0"])
def test_one_that_is_as_new_or_newer_is_not(kernel: str) -> None:
    with pytest.raises(Unsupported, match=f"kernel {kernel} is not older than 7.2: they differ"):
        require_kernel(kernel, "", "7.2", "they differ")
