# SPDX-License-Identifier: Apache-2.0
"""The agent: a VMM process, which does what it is told and says how it went.

One operation at a time, in the main thread, except for those that are asked for `aside`: such a one may be stopped in
the kernel for as long as somebody wants it to be, so it has a thread of its own. All threads take turns, as with
Python's own lock but longer: a turn lasts from one system call to the next. So no thread finds a VM in the middle of
what another does to it, and none waits for what is stopped in the kernel. The main thread gives up its turn only when
it has answered.

The times in an answer are those of the system calls.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures.thread import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

from chaos.errors import InternalError
from chaos.history.records import Value
from chaos.kinds import Kind
from chaos.kvm.call import Around, KernelError, mark, outside, timed
from chaos.kvm.sev import Sev
from chaos.kvm.system import System
from chaos.linux.seqpacket import Channel, Ended, FdSet
from chaos.vmm import bounds, harm, storm
from chaos.vmm import messages as m
from chaos.vmm.ask import ask
from chaos.vmm.fail_nth import PointsToFail
from chaos.vmm.machine import Machine, OpenDevices
from chaos.vmm.messages import Operation, Question, Reply, Request
from chaos.vmm.race import At

CLOSERS = 32  # threads that close what a host was filled with
T = TypeVar("T")
Body = Callable[[], dict[str, Value]]


def serve(name: str, channel: Channel[Request]) -> int:
    """Serve until told to exit, or until nobody is there to tell; the exit code."""
    return Agent(name, channel).serve()


class Agent:
    def __init__(self, name: str, channel: Channel[Request]) -> None:
        self.name = name
        self.channel = channel
        self.machines: dict[str, Machine] = {}
        self._host: OpenDevices | None = None
        self._turn = threading.Lock()
        self._press: harm.MemoryPress | None = None
        self._failing = PointsToFail()

    def serve(self) -> int:
        while True:
            try:
                request, fds = self.channel.receive()
            except Ended:
                return 0  # the runner is gone; so are we, and our VMs with us
            if request.aside:
                # The thread is not waited for: if the process ends first, the kernel gives its call up.
                threading.Thread(target=self._aside, args=(request, fds), name="aside", daemon=True).start()
                continue
            with fds, self._turn:
                self.channel.send(self._reply(request, fds))
            if isinstance(request.do, m.Exit):
                return 0
            if isinstance(request.do, m.EndThread) and not request.do.vm:
                harm.end_first_thread(self._succeed)

    def _succeed(self) -> None:
        """Serve instead of the first thread, which has ended."""
        code = 70
        try:
            code = self.serve()
        finally:
            os._exit(code)

    def _reply(self, request: Request, fds: FdSet, around: Around | None = None) -> Reply:
        do = request.do
        if isinstance(do, Question):
            return self._question(request.id, do)
        start = request.start
        at = None if start is None else At(fds.numbers[-1], start.place, start.others)
        return self._failing.within(do, lambda: _measured(request.id, lambda: self._operation(do, fds, at), around))

    def _aside(self, request: Request, fds: FdSet) -> None:
        """Carry an operation out in this thread, which has a turn whenever it is in no system call."""
        inside = begun = False

        @contextmanager
        def around(tid: int) -> Iterator[None]:
            nonlocal inside, begun
            if inside:
                yield
                return
            if not begun:
                self.channel.send(m.Begun(id=request.id, tid=tid))
            inside = begun = True
            self._turn.release()
            try:
                yield
            finally:
                self._turn.acquire()
                inside = False

        with suppress(Ended), fds, self._turn:
            self.channel.send(self._reply(request, fds, around))

    @property
    def host(self) -> OpenDevices:
        if self._host is None:
            self._host = OpenDevices(System.open())
        return self._host

    def _machine(self, vm: str) -> Machine:
        try:
            return self.machines[vm]
        except KeyError:
            raise InternalError(f"{self.name} has no VM {vm!r}") from None

    def _operation(self, do: Operation, fds: FdSet, at: At | None) -> dict[str, Value]:  # noqa: PLR0912 - a table
        """What is done in the process; what is done to one of its VMs is `_on_machine`."""
        match do:
            case m.Exit():
                _wrapped(self._close_all)
            case m.Create():
                return {"address": self._create(do, fds)}
            case m.AskPlatform():
                return bounds.ask_platform(self.host.platform(), do)
            case m.Close():
                self._close(do.vm)
            case m.LoseDescriptor():
                fd = self._fd(do)
                _wrapped(lambda: harm.lose(fd))
            case m.RunVcpus():
                team = self._machine(do.vm).runnable
                _wrapped(lambda: team.resume(do.every, fds.numbers))
            case m.BindIrqfd() | m.BindIoeventfd():
                self._machine(do.vm).bind(do, fds.numbers[0])
            case m.StartStorm():
                machine = self._machine(do.vm)
                with fds.steal() as memory:
                    _wrapped(lambda: storm.begin(machine, do.threads, do.calls, memory.number))
            case m.Mirror():
                mirror = self._machine(do.vm)
                with mirror.given(do) as owner:
                    mirror.become_mirror(owner, flags=do.flags, at=at)
            case m.Move():
                self._move(do, at)
            case m.Moves():
                assert at is not None
                with fds.steal() as memory:
                    return self._machine(do.vm).moves(do, memory.number, at)
            case (
                m.Listen() | m.Connect() | m.Accept() | m.GetState() | m.ReceiveState() | m.SetState() | m.SendFd()
                | m.ReceiveFd() | m.Commit() | m.Confirm() | m.Disconnect()
            ):  # fmt: skip
                return _hand_over(self._machine(do.vm), do, fds)
            case _:
                return _on_machine(self._machine(do.vm), do)
        return {}

    def _move(self, do: m.Move, at: At | None) -> None:
        """The receiving VMM takes the context over. The source's descriptor is closed as soon as the call is over."""
        destination = self._machine(do.vm)
        with destination.given(do) as source:
            destination.move_from(source, flags=do.flags, at=at)

    def _close(self, vm: str) -> None:
        """Nobody can do anything else to a VM that is being closed, which may take the firmware long."""
        machine = self._machine(vm)
        del self.machines[vm]
        try:
            with outside():
                _wrapped(machine.close)
        except BaseException:
            self.machines[vm] = machine
            raise

    def _close_all(self) -> None:
        for machine in self.machines.values():
            machine.close()
        self.machines.clear()

    def _create(self, do: m.Create, fds: FdSet) -> int:
        """Where its memory lies."""
        if do.vm in self.machines:
            raise InternalError(f"{self.name} has a VM {do.vm!r} already")
        with fds.steal() as memory:
            self.machines[do.vm] = Machine.create(
                self.host, Kind(do.kind), do.vcpus, memory.number, vm_type=do.type, lane=do.lane, lanes=do.lanes,
                device=do.device,
            )  # fmt: skip
        return self.machines[do.vm].memory.start

    def _question(self, number: int, do: Question) -> Reply:
        try:
            return self._answer(number, do)
        except KernelError as error:
            return Reply(id=number, errno=error.number, firmware=error.firmware, call=error.call)
        except OSError as error:
            return Reply(id=number, errno=error.errno or errno.EPROTO, call=str(error))
        except Exception:
            return Reply(id=number, bug=traceback.format_exc(limit=6))

    def _answer(self, number: int, do: Question) -> Reply:
        match do:
            case m.Sample():
                return Reply(id=number, sampled=self._machine(do.vm).sample())
            case m.Ask():
                machine = self._machine(do.vm)
                answers = ask(self.host.system, machine.vm, machine.every_vcpu, machine.device)
                value: dict[str, Value] = {} if machine.no_device is None else {"device": machine.no_device}
                return Reply(id=number, answers=answers, value=value)
            case m.Whose():
                return Reply(id=number, value={"whose": self._machine(do.vm).whose()})
            case m.Fill():
                return Reply(id=number, filled=self._fill(do.key))
            case m.ArmPage():
                self._machine(do.vm).arm_page()
            case m.PutPage():
                self._machine(do.vm).put_page()
            case _:
                return Reply(id=number, value=self._harm(do))
        return Reply(id=number)

    def _harm(self, do: m.Harm) -> dict[str, Value]:
        """What faults want to know, and have done that cannot be done from outside."""
        match do:
            case m.Inside():
                return {"lost": harm.is_lost(self._fd(do)), "threads": list(self._machine(do.vm).threads)}
            case m.Shown():
                return {"there": self._machine(do.vm).has_memory()}
            case m.Handled():
                seen = [each for machine in self.machines.values() for each in machine.seen]
                interrupted, early = sum(each.interrupted for each in seen), sum(each.early for each in seen)
                return {"handled": harm.handled(), "interrupted": interrupted, "early": early}
            case m.ArmFailNth():
                self._failing.arm(do)
            case m.FailedNth():
                return self._failing.tell(do.vm, do.operation, disarm=do.disarm)
            case m.EndThread() if do.vm:
                self._machine(do.vm).runnable.stop()
            case m.Eat():
                harm.eat(do.mebibytes)
            case m.Press():
                self._press = harm.press(do.mebibytes, self._press)
            case m.MayLock():
                harm.may_lock(do.allowed)
            case m.PunchOut():
                self._machine(do.vm).memory.give_up(do.offset, do.length)
        return {}

    def _fd(self, do: m.LoseDescriptor | m.Inside) -> int:
        """A descriptor by its name: "vm", "vcpu 0", "sev"."""
        machine = self._machine(do.vm)
        match do.fd.split():
            case ["sev"]:
                return self.host.sev_fd()
            case ["vcpu", number]:
                return machine.vcpus[int(number)].fd.number
        return machine.vm.fd.number

    def _fill(self, key: str) -> m.FilledContexts:
        """Take contexts until the next one is refused. All are given back before the answer, side by side: each waits
        for grace periods of RCU, and a host may have a thousand."""
        with ThreadPoolExecutor(CLOSERS) as closers, ExitStack() as stack:
            for count in range(1 << 16):
                try:
                    vm = self.host.system.create_vm()
                    stack.callback(closers.submit, vm.close)
                    sev = Sev(vm.fd.number, self.host.sev_fd())
                    if key == Kind.SEV_ES.key:
                        sev.es_init()
                    else:
                        sev.init()
                except KernelError as error:
                    return m.FilledContexts(count=count, errno=error.number, call=error.call)
        raise InternalError("there is no end to the contexts")


OnMachine = (
    m.Init | m.AddVcpu | m.Command | m.RegisterRegion | m.UnregisterRegion | m.LaunchStart | m.LaunchUpdateData
    | m.LaunchUpdateVmsa | m.LaunchMeasure | m.LaunchFinish | m.Status
    | m.Decrypt | m.Encrypt | m.Pause | m.EndStorm | m.SetMemory | m.Interrupts
)  # fmt: skip


def _on_machine(machine: Machine, do: OnMachine) -> dict[str, Value]:  # noqa: PLR0911, PLR0912 - a table
    match do:
        case m.Init():
            machine.init(do.key, do.command, flags=do.flags, features=do.features, ghcb=do.ghcb)
        case m.AddVcpu():
            machine.add_vcpu(do.id, bare=do.bare)
        case m.Command():
            machine.sev.command(do.id)
        case m.RegisterRegion():
            machine.register_region(do.address)
        case m.UnregisterRegion():
            machine.unregister_region(do.address)
        case m.LaunchStart():
            return machine.launch_start(do.policy, read_only=do.read_only)
        case m.LaunchUpdateData():
            machine.launch_update_data(do.lanes, do.address)
        case m.LaunchUpdateVmsa():
            machine.sev.launch_update_vmsa()
        case m.LaunchMeasure():
            return machine.launch_measure()
        case m.LaunchFinish():
            machine.sev.launch_finish()
        case m.Status():
            return machine.guest_status()
        case m.Decrypt() | m.Encrypt():
            return bounds.debug(machine.sev, machine.memory, do)
        case m.Pause():
            return _wrapped(machine.pause)
        case m.EndStorm():
            _wrapped(lambda: storm.end(machine))
        case m.SetMemory():
            machine.set_memory(there=do.there, slot=do.slot)
        case m.Interrupts():
            return {"vectors": list(machine.interrupts())}
    return {}


HandOver = (
    m.Listen | m.Connect | m.Accept | m.GetState | m.ReceiveState | m.SetState | m.SendFd | m.ReceiveFd | m.Commit
    | m.Confirm | m.Disconnect
)  # fmt: skip


def _hand_over(machine: Machine, do: HandOver, fds: FdSet) -> dict[str, Value]:
    peer = machine.peer
    match do:
        case m.Listen():
            return _wrapped(lambda: {"port": peer.listen(fds.steal(), do.address)})
        case m.Connect() if do.address:
            _wrapped(lambda: peer.connect(fds.steal(), do.address, do.port, do.vm, do.peer, within=do.within_ms / 1000))
        case m.Connect():
            _wrapped(lambda: peer.join(fds.steal()))
        case m.Accept():
            _wrapped(lambda: peer.accept(do.vm, do.peer, within=do.within_ms / 1000))
        case m.GetState():
            return machine.get_state(within=do.within_ms / 1000)
        case m.ReceiveState():
            return _wrapped(lambda: machine.receive_state(within=do.within_ms / 1000))
        case m.SetState():
            return machine.set_state()
        case m.SendFd():
            _wrapped(machine.send_fd)
        case m.ReceiveFd():
            _wrapped(lambda: machine.receive_fd(do.source))
        case m.Commit():
            _wrapped(lambda: peer.commit(within=do.within_ms / 1000))
        case m.Confirm():
            _wrapped(lambda: peer.confirm(within=do.within_ms / 1000))
        case m.Disconnect():
            _wrapped(peer.disconnect)
    return {}


def _wrapped(body: Callable[[], T]) -> T:
    """An operation that is no single system call: what is measured is all of it."""
    began = time.monotonic_ns()
    mark(began, began)
    try:
        return body()
    finally:
        mark(began, time.monotonic_ns())


def _measured(number: int, body: Body, around: Around | None) -> Reply:
    with timed(around) as watch:
        try:
            value = body()
        except KernelError as error:
            return Reply(
                id=number, errno=error.number, firmware=error.firmware, call=error.call,
                began=watch.began, ended=watch.ended, value=dict(error.told),
            )  # fmt: skip
        except OSError as error:
            # One without a number is never told as EIO, which says that a VM is dead.
            code = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno or errno.EPROTO
            return Reply(id=number, errno=code, call=error.strerror or str(error), began=watch.began, ended=watch.ended)
        except Exception:
            return Reply(id=number, bug=traceback.format_exc(limit=6), began=watch.began, ended=watch.ended)
    return Reply(id=number, began=watch.began, ended=watch.ended, value=value)
