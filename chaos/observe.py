# SPDX-License-Identifier: Apache-2.0
"""Looking at the host: the counters of the run's cgroups and the firmware's guest count.

Two witnesses that know nothing of each other. What one cannot say is left out or None, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable

from chaos.cgroup.group import Cgroup
from chaos.history import Observation
from chaos.kvm.call import KernelError
from chaos.kvm.sev import Platform
from chaos.recorder import Recorder


class Observer:
    """`group` is the run's cgroup. `lost` is told, once, that the firmware cannot be asked. It is not asked at all
    while `reticent`, as when a command may be stalled, behind which the question would wait."""

    def __init__(
        self,
        group: Cgroup,
        platform: Platform | None,
        lost: Callable[[str], None],
        reticent: Callable[[], bool] = lambda: False,
    ) -> None:
        self._group = group
        self._reticent = reticent
        self._platform = platform
        self._lost: Callable[[str], None] | None = lost

    def observe(self, recorder: Recorder, label: str, step: int) -> Observation:
        began = recorder.now()
        misc = {self._name(group): group.misc() for group in self._group.walk()}
        guests = self._guests()
        dying = self._group.dying()
        observation = Observation(
            t=began, label=label, step=step, until=recorder.now(), misc=misc, guests=guests, dying=dying
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
