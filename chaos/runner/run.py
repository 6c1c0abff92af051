# SPDX-License-Identifier: Apache-2.0
"""One run, from its first record to its last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from chaos.cgroup.group import Cgroup
from chaos.errors import CleanupFailed, HostLacks, SevchaosError, Unsupported
from chaos.fault import find
from chaos.history.records import End, Filled, Header, Kernel
from chaos.kvm.sev import Platform
from chaos.linux.batches import drain_page_batches
from chaos.linux.kmsg import KernelLog, Lost, lockdep_off, rearm
from chaos.linux.loop import LOOK_AGAIN, Loop, TimedOut
from chaos.linux.patience import patience
from chaos.native import library
from chaos.runner.cgroups import CgroupTree
from chaos.runner.devices import with_device
from chaos.runner.entries import EntryWitness
from chaos.runner.fault_context import RunContext
from chaos.runner.guests import Guests
from chaos.runner.holds.failpoints import RunFailpoints
from chaos.runner.kernel_objects import LeakWitness
from chaos.runner.network import Network, between
from chaos.runner.observer import Observer
from chaos.runner.operations import OperationLog
from chaos.runner.order import Order
from chaos.runner.recorder import Recorder
from chaos.runner.script import STEPS, perform, require_all
from chaos.runner.script.automatic import AutomaticQuestions
from chaos.runner.script.executor import Executor
from chaos.runner.storage import StateFile
from chaos.runner.tracing import Tracer
from chaos.runner.uplink import Outside
from chaos.runner.vmms import StepFailed, VmmProcesses
from chaos.safety import claim
from chaos.safety.claim import Claim
from chaos.safety.survey import (
    Paths,
    Surveyed,
    allowance,
    hierarchy,
    refuse_others,
    require,
    require_ccp,
    require_kernel,
    survey,
)
from chaos.safety.warden import Warden
from chaos.vmm.messages import Fill
from chaos.vmm.server import ForkServer

# Taking one context takes about a millisecond, emulated ten; a machine has up to about a thousand.
FILL_WITHIN = 120.0
MOVE_ENDS_WITHIN = 30.0
GONE_WITHIN = 5.0
# No VMM of an experiment can have a cgroup of this name: names are lower case letters, digits and dashes.
HELPER = "_fill"


class Interrupted(Exception):
    """Somebody wants the runner to end."""


@dataclass(slots=True)
class ExperimentRun:
    """One run. What has to be undone is on `stack`, in the order of what depends on what."""

    order: Order
    server: ForkServer
    warden: Warden
    recorder: Recorder
    outside: Outside
    tracer: Tracer
    leaks: LeakWitness
    earlier: int = 0  # how many runs there were in this process before
    paths: Paths = field(default_factory=Paths)
    loop: Loop = field(default_factory=Loop)
    reasons: list[str] = field(default_factory=list)

    def carry_out(self) -> None:
        """Raises `OutsideGone` and `Interrupted`, having removed everything."""
        root, lacking = _hierarchy(self.paths)
        host = survey(self.order.host, self.paths, root)
        lost: list[str] = []
        with ExitStack() as stack:
            log = self._open_log(stack, lost.append)
            self._header(host, log.ahead if log is not None else None)
            for said in lost:
                self.recorder.lost("log", said)
            try:
                if root is None:
                    raise lacking
                self._in_cgroup(host, root, stack)
            except (SevchaosError, StepFailed, OSError) as error:
                self._failed(error)
            if log is not None:
                self._close_log(log)
        self.recorder.write(End(t=self.recorder.now(), complete=not self.reasons, reason="; ".join(self.reasons)))

    def _header(self, host: Surveyed, log_ahead: int | None) -> None:
        self.recorder.write(
            Header(
                t=self.recorder.now(), experiment=self.order.experiment.name, seed=self.order.seed, host=host.name,
                kernel=host.kernel, release=host.release, executes_es=host.executes_es, asids=dict(host.asids),
                shared=self.order.shared, log_ahead=log_ahead,
                patience=dict(patience(self.paths.proc, self.paths.modules)), earlier=self.earlier,
            )
        )  # fmt: skip

    def _failed(self, error: Exception) -> None:
        """Say it now, and again at the end."""
        reason = _told(error)
        self.reasons.append(reason)
        topic: Literal["skipped", "error", "left"] = "error"
        if isinstance(error, Unsupported):
            topic = "skipped"
        elif isinstance(error, CleanupFailed):
            topic = "left"
        self.recorder.note(topic, reason, error.step if isinstance(error, StepFailed) else -1)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """What fails inside is said, and the rest is done all the same."""
        try:
            yield
        except (SevchaosError, StepFailed, TimedOut, OSError) as error:
            self._failed(error)

    # -- the kernel's log ---------------------------------------------------------------------------------

    def _open_log(self, stack: ExitStack, lost: Callable[[str], None]) -> KernelLog | None:
        try:
            log = KernelLog(self.paths.kmsg)
            stack.callback(log.close)
            log.compare(lost)
        except OSError as error:
            lost(f"the kernel's log: {self.paths.kmsg}: {error.strerror}")
            return None
        except Lost as error:
            lost(f"the kernel's log: {error}")
            return None
        unarmed = rearm(self.paths.proc / "sys" / "kernel" / "tainted", self.paths.debug)
        for silent in filter(None, (unarmed, lockdep_off(self.paths.proc))):
            lost(f"the kernel's log: {silent}")
        self.loop.watch(log.fd.number, lambda: self._read_log(log))
        return log

    def _read_log(self, log: KernelLog) -> None:
        try:
            for line in log.lines(lambda lost: self.recorder.lost("log", lost)):
                self.recorder.write(Kernel(t=line.t + (log.ahead or 0), level=line.level, text=line.text))
        except Lost as lost:
            self.loop.forget(log.fd.number)
            self.recorder.lost("log", f"the kernel's log: {lost}")

    def _close_log(self, log: KernelLog) -> None:
        """Read what is left, up to a line of our own."""
        signed = log.signed
        with contextlib.suppress(OSError):  # then it is not heard either
            log.sign()
        self.loop.turn(0)
        self._read_log(log)
        if log.heard <= signed:
            self.recorder.lost("log", "the kernel's log: what was written into it was not read back")

    # -- the run ------------------------------------------------------------------------------------------

    def _in_cgroup(self, host: Surveyed, root: Cgroup, stack: ExitStack) -> None:
        """Everything between Header and End."""
        library.load()
        require(host, self.paths, self.order.experiment.keys, self.order.experiment.types)
        require_ccp(self.paths, self.order.experiment.ccp)
        kernels = self.order.experiment.kernels
        if kernels is not None:
            require_kernel(host.kernel, kernels.since, kernels.before, kernels.why)
        platform = self._platform(stack)
        if not (host.is_lab or self.order.shared):
            refuse_others(root, platform)
        claimed = claim.claim(root, self.order.experiment.name)
        self.warden.guard(claimed)
        log = OperationLog(self.recorder)
        vmms = VmmProcesses(self.server, self.loop, log)
        try:
            self._limit(host, root, claimed.cgroup)
            self._measured(host, log, vmms, claimed, platform, stack)
        finally:
            vmms.close()
            with self._going_on():
                claimed.give_up()

    def _platform(self, stack: ExitStack) -> Platform | None:
        try:
            platform = Platform.open(self.paths.sev)
        except OSError:
            return None
        stack.callback(platform.close)
        return platform

    def _limit(self, host: Surveyed, root: Cgroup, group: Cgroup) -> None:
        """The run's own ceiling, so that it cannot take what others need."""
        for key, number in allowance(host, root).items():
            group.limit(key, number)
            text = f"of {host.asids[key]} {key} ASIDs the run may take {number}; the others are left to the host"
            self.recorder.note("progress", text)

    def _measured(
        self, host: Surveyed, log: OperationLog, vmms: VmmProcesses, claimed: Claim, platform: Platform | None,
        stack: ExitStack,
    ) -> None:  # fmt: skip
        """The run between its two fillings and its two observations."""
        group = claimed.cgroup
        firmware = RunFailpoints(self.outside, self.order.seed, platform)
        # On a shared host its count is of everybody's guests, and tells nothing of ours.
        asked = None if self.order.shared else platform
        observer = Observer(
            self.recorder, group, asked, lambda lost: self.recorder.lost("guests", lost), lambda: firmware.may_stall,
            self.paths, self.leaks,
        )  # fmt: skip
        length = len(self.order.experiment.script)
        cgroups = CgroupTree(group, log, vmms)
        guests = Guests(self.order.experiment, vmms, cgroups, host.executes_es)
        ctx = RunContext(
            vmms, guests, cgroups, self.warden, firmware, StateFile(log), EntryWitness(self.recorder), self.loop, stack,
            self.order.shared, self.order.seed,
        )  # fmt: skip
        require_all(self.order.experiment.script, ctx)  # now, not in the middle
        self._fill("start", host, vmms, group)
        with self.tracer.recording(self.loop, self.recorder, group.path.name) as untraced:
            cgroups.make(self.order.experiment.groups)
            observer.observe("start", -1, whole_host=True)
            with self._going_on(), ExitStack() as undo:
                executor = Executor(
                    guests=guests,
                    vmms=vmms,
                    log=log,
                    loop=self.loop,
                    observer=observer,
                    undo=undo,
                    ctx=ctx,
                    handlers=STEPS,
                    untraced=untraced,
                    withhold=self.order.withhold,
                )
                questions = AutomaticQuestions(executor, self.order.experiment.questions == "automatic")
                undo.callback(guests.clear)
                undo.callback(self._tear_down, guests, questions)
                try:
                    with self._going_on():
                        self._perform(executor, questions)
                finally:
                    log.step = length
        with self._going_on():
            self._settle(group)
            observer.observe("end", length, whole_host=True)
            for below in group.children():
                below.destroy()
            self._fill("end", host, vmms, group)

    def _perform(self, executor: Executor, questions: AutomaticQuestions) -> None:
        experiment, guests = self.order.experiment, executor.guests
        guests.network = Network.lay(between(experiment.handovers))
        guests.start()
        guests.devices = with_device(
            experiment, lambda step: find(step.fault, step.options).ends(executor.ctx, step.target)
        )
        perform(executor, experiment.script, questions)

    def _fill(self, label: str, host: Surveyed, vmms: VmmProcesses, group: Cgroup) -> None:
        """Take every context that can be had, from within the run's cgroup, and give all back."""
        helper_group = group.create(HELPER)
        try:
            helper = vmms.spawn(f"{HELPER}-{label}", helper_group, recorded=False)
            count: dict[str, int] = {}
            errno: dict[str, int] = {}
            for key in sorted(key for key, capacity in host.asids.items() if capacity):
                filled = vmms.ask(helper, Fill(key=key), FILL_WITHIN).filled
                assert filled is not None
                count[key], errno[key] = filled.count, filled.errno
            vmms.end(helper)
        finally:
            helper_group.destroy()
            self._settle(group)
        self.recorder.write(
            Filled(
                t=self.recorder.now(), label=label, count=count, errno=errno,
                dying=group.dying(), dying_misc=group.dying_of("misc"),
            )
        )  # fmt: skip

    def _settle(self, group: Cgroup) -> None:
        """The kernel lets go of a removed cgroup a moment later; what stays longer shows in the next record. Pages that
        a CPU has not put away yet are not what is looked for."""

        def gone() -> bool:
            if not (group.dying() or group.dying_of("misc")):
                return True
            drain_page_batches()
            return False

        with contextlib.suppress(TimedOut):
            self.loop.wait(gone, GONE_WITHIN, "a removed cgroup to go", look=LOOK_AGAIN)

    def _tear_down(self, guests: Guests, questions: AutomaticQuestions) -> None:
        """Close every VM and end every VMM, as far as they are still there."""
        for pending in guests.under_way.values():
            if not pending.over:
                for vm in guests.all:
                    if vm.running:
                        with self._going_on():
                            guests.leave(vm)  # this is what a held move waits for
                with self._going_on():
                    guests.vmms.wait(pending, MOVE_ENDS_WITHIN)
        with self._going_on():
            questions.last()
        self._last_words(guests)
        for vm in guests.all:
            if vm.created and vm.vmm.alive:
                with self._going_on():
                    guests.close(vm)
        for vmm in list(guests.vmms.named.values()):
            if vmm.recorded:
                with self._going_on():
                    guests.vmms.end(vmm)

    def _last_words(self, guests: Guests) -> None:
        """What each guest that still runs says when it is taken out, and what each VM answers whose context was moved
        away: the guest has to be whole to the very end, and the dead have to stay dead."""
        present = [vm for vm in guests.all if vm.created and vm.vmm.alive]
        for vm in present:
            if vm.running:
                with self._going_on():
                    guests.leave(vm)
        for vm in present:
            if vm.vmm.alive and guests.is_dead(vm.name):
                with self._going_on():
                    guests.ask(vm)


def _hierarchy(paths: Paths) -> tuple[Cgroup | None, HostLacks]:
    try:
        return hierarchy(paths), HostLacks("")
    except HostLacks as lacking:
        return None, lacking


def _told(error: Exception) -> str:
    if isinstance(error, SevchaosError):
        return f"{error.message}; {error.remedy}" if error.remedy else error.message
    return str(error)
