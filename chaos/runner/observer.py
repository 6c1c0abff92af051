# SPDX-License-Identifier: Apache-2.0
"""Looking at the host: the counters of the run's cgroups and the firmware's guest count.

Two witnesses that know nothing of each other, and before and after the script others, which cost more to ask: how many
pages are pinned, and what the kernel shows of the VMs that there are. What one cannot say is left out or None, never
guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from chaos.cgroup.group import Cgroup
from chaos.history.records import Observation
from chaos.kvm.call import KernelError
from chaos.kvm.sev import Platform
from chaos.runner import kernel_objects
from chaos.runner.recorder import Recorder
from chaos.safety.survey import Paths

T = TypeVar("T")


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
        paths: Paths | None = None,
        leaks: kernel_objects.LeakWitness | None = None,
    ) -> None:
        self._recorder = recorder
        self._group = group
        self._reticent = reticent
        self._paths = paths or Paths()
        self._platform = platform
        self._lost: Callable[[str], None] | None = lost
        self._leaks = leaks or kernel_objects.LeakWitness()
        self._begun = False

    def observe(self, label: str, step: int, *, whole_host: bool = False) -> Observation:
        """With `whole_host` also what is not the run's alone."""
        recorder = self._recorder
        began = recorder.now()
        misc = {self._name(group): group.misc() for group in self._group.walk()}
        observation = Observation(
            t=began, label=label, step=step, until=began, misc=misc, guests=self._guests(), dying=self._group.dying()
        )
        if whole_host:
            observation = self._with_objects(observation)
        observation = msgspec.structs.replace(observation, until=recorder.now())
        recorder.write(observation)
        return observation

    def _with_objects(self, observation: Observation) -> Observation:
        unseen: dict[str, str] = {}

        def seen(name: str, read: Callable[[], T | None]) -> T | None:
            """None with the reason in `unseen`, where the host does not show it."""
            try:
                value = read()
            except OSError as error:
                unseen[name] = f"{error.filename}: {error.strerror}"
                return None
            if value is None:
                unseen[name] = "this kernel does not count them"
            return value

        paths = self._paths
        stat = seen("tables", lambda: kernel_objects.vmstat(paths.proc))
        return msgspec.structs.replace(
            observation,
            pinned=None if stat is None else kernel_objects.pinned(stat),
            tables=None if stat is None else seen("tables", lambda: kernel_objects.tables(stat)),
            vms=seen("vms", lambda: kernel_objects.vms(paths.debug)),
            objects=seen("objects", lambda: kernel_objects.objects(paths.slab)),
            references=seen("references", lambda: kernel_objects.references(paths.modules)),
            dying_misc=seen("dying_misc", lambda: self._group.dying_of("misc")),
            eventfds=seen("eventfds", lambda: kernel_objects.eventfds(paths.proc)),
            leaked=seen("leaked", self._leaked) if (paths.debug / "kmemleak").exists() else None,
            unseen=unseen,
        )

    def _leaked(self) -> tuple[str, ...]:
        """Nothing when it is asked first: what was lost before is nobody's here. Raises OSError."""
        kmemleak = self._paths.debug / "kmemleak"
        if not self._begun:
            self._leaks.begin(kmemleak)
            self._begun = True
            return ()
        return self._leaks.end(kmemleak)

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
