# SPDX-License-Identifier: Apache-2.0
"""The module that plants defects, by itself: it builds, and every defect can be planted in every kernel."""

from __future__ import annotations

import json

import pytest

from chaos.lab.kernel.build import warnings
from chaos.lab.kernel.find import build_module, find_kernel
from tests.lab.conftest import Sevchaos
from tests.lab.defects.conftest import PACKAGE, PLANTED

pytestmark = pytest.mark.lab

DEFECTS = (
    "charged-twice", "dead-destination", "device-answers", "event-elsewhere", "flag-left", "foreign-refused",
    "last-asid", "leak", "lock-inversion", "lost-wakeup", "race", "region-answers", "slab-overrun", "status-refused",
    "unkillable-wait", "use-after-free",
)  # fmt: skip
INSTRUMENTED = {"leak", "lock-inversion", "race", "use-after-free"}  # refused where no instrument would see them
NOT_HERE = {"debian:6.1": {"event-elsewhere"}}  # 6.1 has no misc.events.local

PLANT = 'for defect in "$@"; do echo $defect > /proc/planted || true; done; cat /proc/planted'


def test_it_builds_without_a_warning(kernel: str) -> None:
    assert warnings(build_module(find_kernel(kernel), "planted", source=PACKAGE / "module")) == []


def test_each_defect_has_an_experiment() -> None:
    assert all((PLANTED / f"planted-{defect}.yaml").is_file() for defect in DEFECTS)


def test_every_defect_can_be_planted(kernel: str, sevchaos: Sevchaos) -> None:
    """And does nothing before anybody makes a VM. One that there is not is refused, and one that this cannot have."""
    module = build_module(find_kernel(kernel), "planted", source=PACKAGE / "module")
    options = ("lab", "run", "--quiet", "--kernel", kernel, "--insmod", str(module))
    done = sevchaos(*options, "--", "sh", "-c", PLANT, "sh", "no-such", *DEFECTS)
    told = dict(line.split(" ", 1) for line in done.stdout.decode().splitlines())
    assert set(told) == set(DEFECTS), done.stderr.decode()
    for defect, counts in told.items():
        planted = int(defect not in INSTRUMENTED | NOT_HERE.get(kernel, set()))
        assert counts == f"planted={planted} reached=0 activated=0", defect


@pytest.mark.parametrize(
    ("defect", "answers"),
    [
        ("", {"device": "EIO", "region": "EIO"}),
        ("device-answers", {"device": "ENXIO", "region": "EIO"}),
        ("region-answers", {"device": "EIO", "region": "ENOTTY"}),
    ],
)
def test_what_a_dead_vm_answers(kernel: str, sevchaos: Sevchaos, defect: str, answers: dict[str, str]) -> None:
    """Of these two a run activates nothing unless it asks; here somebody does. Without a defect a dead VM is dead."""
    module = build_module(find_kernel(kernel), "planted", source=PACKAGE / "module")
    loaded = f"{module},plant={defect}" if defect else str(module)
    program = PACKAGE / "dead_vm.py"
    options = ("lab", "run", "--quiet", "--kernel", kernel, "--insmod", loaded, "--copy", str(program))
    done = sevchaos(*options, "--", "python3", program.name)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == {"before": {"device": "ENXIO", "region": "EINVAL"}, "after": answers}
