# SPDX-License-Identifier: Apache-2.0
"""Looking at the host: the counters of the run's cgroups and the firmware's guest count.

Two witnesses that know nothing of each other, and before and after the script a third: how many pages are pinned, which
costs more to ask. What one cannot say is left out or None, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chaos.cgroup.group import Cgroup
from chaos.history.records import Observation
from chaos.kvm.call import KernelError
from chaos.kvm.sev import Platform
from chaos.runner.recorder import Recorder


def pinned_pages(proc: Path) -> int | None:
    """How many pages are pinned on this host, by whomever; None if nobody can say.

    The kernel counts every pin that was ever taken and every one that was given back (since 5.8). Each CPU keeps a few
    of either to itself until vm.stat_refresh is read, which only root may.
    """
    try:
        (proc / "sys/vm/stat_refresh").read_bytes()
        lines = [line.split() for line in (proc / "vmstat").read_text().splitlines()]
    except OSError:
        return None
    counts = {fields[0]: int(fields[1]) for fields in lines if fields[0].startswith("nr_foll_pin_")}
    if len(counts) != 2:
        return None
    return counts["nr_foll_pin_acquired"] - counts["nr_foll_pin_released"]


class Observer:
    """Observations go to `recorder`. `group` is the run's cgroup. `lost` is told, once, that the firmware cannot be
    asked. It is not asked at all while `reticent`, as when a command may be stalled, behind which it would wait."""

    def __init__(
        self,
        recorder: Recorder,
        group: Cgroup,
        platform: Platform | None,
        lost: Callable[[str], None],
        reticent: Callable[[], bool] = lambda: False,
        proc: Path = Path("/proc"),
    ) -> None:
        self._recorder = recorder
        self._group = group
        self._reticent = reticent
        self._proc = proc
        self._platform = platform
        self._lost: Callable[[str], None] | None = lost

    def observe(self, label: str, step: int, *, pins: bool = False) -> Observation:
        recorder = self._recorder
        began = recorder.now()
        misc = {self._name(group): group.misc() for group in self._group.walk()}
        guests = self._guests()
        dying = self._group.dying()
        pinned = pinned_pages(self._proc) if pins else None
        observation = Observation(
            t=began, label=label, step=step, until=recorder.now(), misc=misc, guests=guests, dying=dying, pinned=pinned
        )
        recorder.write(observation)
        return observation

    def _name(self, group: Cgroup) -> str:
        return str(group.path.relative_to(self._group.path))

    def _guests(self) -> int | None:
        if self._reticent():
            return None
        reason = "/dev/sev could not be opened, or others share it"
        if self._platform is not None:
            try:
                return int(self._platform.status().guest_count)
            except KernelError as error:
                reason = str(error)
        if self._lost is not None:
            self._lost(f"the firmware's guest count: {reason}")
            self._lost = None
        return None
