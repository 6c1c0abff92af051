# SPDX-License-Identifier: Apache-2.0
"""What instrumented kernels say of a defect: KASAN, lockdep, kmemleak and KCSAN one each.

Such a kernel takes half an hour to build, so nothing builds it for this: `sevchaos kernel build debian:7.3
--with kasan`, and `--with kcsan`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.conftest import skip_unless_built
from tests.lab.defects.conftest import BROKEN, runs_on, site_with_module, smallest

pytestmark = [pytest.mark.lab, pytest.mark.nightly]
KASAN, KCSAN = "debian:7.3+kasan", "debian:7.3+kcsan"


@pytest.mark.parametrize(
    ("kernel", "defect", "promise", "said"),
    [
        (KASAN, "use-after-free", "P12", "BUG: KASAN: slab-use-after-free in read_freed"),
        (KASAN, "lock-inversion", "P12", "WARNING: possible circular locking dependency detected"),
        (KASAN, "leak", "P9", "forgotten"),
        (KCSAN, "race", "P12", "BUG: KCSAN: data-race in read_it"),
    ],
)
def test_a_defect_is_told_with_its_operation(kernel: str, defect: str, promise: str, said: str, tmp_path: Path) -> None:
    skip_unless_built(kernel)
    run = runs_on(kernel, site_with_module(tmp_path / "site", kernel), tmp_path)(smallest(defect))
    assert run.activated
    assert run.outcome(promise) == BROKEN, run.verdicts
    assert said in run.verdicts[promise]["reason"]
    if promise == "P12":
        assert "during move of new" in run.verdicts[promise]["reason"]
