# SPDX-License-Identifier: Apache-2.0
"""What kfault does to a call: the planted defects, the holds, the delays, and who is counted."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path
from typing import Any

from chaos.linux import tracefs
from chaos.linux.kallsyms import base_name, copies, kallsyms
from chaos.linux.kfault import EVERY, Happening, Kfault, NotReached, Refused
from tests.lab.programs.kfault.child import Child, Group, Vms

FORCE = Path("/sys/module/kfault/parameters/force")
LIST = Path("known.h")  # brought along by the test


def _init(vms: Vms) -> str:
    vms.init(vms.create())
    return "charged"


def _init_again(vms: Vms) -> str:
    """The same VM each time: after a refusal it can be tried again."""
    vms.init(vms.vms[0] if vms.vms else vms.create())
    return "charged"


def _try_mirror(vms: Vms) -> str:
    """A call that costs nothing: EBADF, unless it is not made."""
    (vms.vms[0] if vms.vms else vms.create()).copy_context_from(0xFFFF)
    return "done"


class _Mover:
    """First call: a VM with a charge in the first group. Second: a VM with a vCPU and a move, from the other group."""

    def __init__(self, there: Group) -> None:
        self.there = there

    def __call__(self, vms: Vms) -> str:
        if not vms.vms:
            return _init(vms)
        self.there.join()
        destination = vms.create()
        destination.create_vcpu(0)
        destination.move_context_from(vms.vms[0].fd.number)
        return "moved"


def _balance(group: Group) -> None:
    """Take a charge off that nobody holds: a VM that was not charged is uncharged all the same when it goes."""
    with Child(_init, group) as child, Kfault.open() as kfault:
        kfault.returns("misc_cg_try_charge", value=0, pid=child.pid)
        assert child.ask() == "charged"


def charge_skipped() -> dict[str, Any]:
    """misc_cg_try_charge reports success and charges nothing."""
    with Group("quiet") as group, Child(_init, group) as child:
        assert child.ask() == "charged"
        before = group.charges()
        with Kfault.open() as kfault:
            slot = kfault.returns("misc_cg_try_charge", value=0, pid=child.pid)
            assert child.ask() == "charged"
            fired = kfault.wait(slot, Happening.RETURNED, within=1)
            with_two = group.charges()
            other = kfault.returns("misc_cg_uncharge", value=0, pid=child.pid)  # or the count would fall below zero
            child.kill()
            assert child.ended()
            undone = kfault.wait(other, Happening.RETURNED, within=1)
        assert fired is not None and fired.pid == child.pid and undone is not None
        assert (before, with_two, group.charges()) == (1, 1, 0)
        return {"one VM": before, "two VMs": with_two, "none": group.charges()}


def uncharge_skipped() -> dict[str, Any]:
    """misc_cg_uncharge does nothing: after a move both cgroups are charged, and so they stay."""
    seen = {}
    for name, planted in (("as it should be", False), ("planted", True)):
        with Group("source") as source, Group("destination") as destination:
            with Child(_Mover(destination), source) as child, Kfault.open() as kfault:
                assert child.ask() == "charged"
                if planted:
                    kfault.returns("misc_cg_uncharge", value=0, times=EVERY, pid=child.pid)
                assert child.ask() == "moved"
                moved = (source.charges(), destination.charges())
                child.kill()
                assert child.ended()
                fired = sum(event.what is Happening.RETURNED for event in kfault.events())
            seen[name] = [moved, (source.charges(), destination.charges()), fired]
            if planted:
                _balance(source)
                _balance(destination)
            assert (source.charges(), destination.charges()) == (0, 0)
    assert seen == {"as it should be": [(0, 1), (0, 0), 0], "planted": [(1, 1), (1, 1), 2]}, seen
    return seen


def charge_refused() -> dict[str, Any]:
    """misc_cg_try_charge fails with EBUSY though there is room: no limit was met, and the next try succeeds."""
    with Group("room") as group, Child(_init_again, group) as child, Kfault.open() as kfault:
        slot = kfault.returns("misc_cg_try_charge", value=-errno.EBUSY, pid=child.pid)
        answers = [child.ask(), group.charges(), group.refusals(), child.ask(), group.charges()]
        assert kfault.wait(slot, Happening.RETURNED, within=1) is not None
        assert answers == [errno.EBUSY, 0, 0, "charged", 1], answers
        return {"answers": answers}


def hold_a_hundred_times() -> dict[str, Any]:
    """Reached, seen asleep, released and gone on, a hundred times; nothing gets past it in between."""
    rounds = 100
    with Group("full", sev_max="0") as group, Child(_init_again, group) as child, Kfault.open() as kfault:
        slot = kfault.hold("misc_cg_try_charge", times=rounds, pid=child.pid)
        for call in range(1, rounds + 1):
            child.go()
            reached = kfault.wait_reached(slot, within=5, watch=[child.pid])
            assert (reached.call, reached.tid) == (call, child.pid)
            assert child.asleep() and not child.answered(0)
            assert group.refusals() == call - 1
            kfault.release(slot)
            assert child.answer() == errno.EBUSY
            assert kfault.wait(slot, Happening.RELEASED, call=call, within=1) is not None
        assert child.ask() == errno.EBUSY  # the 101st is not held
        assert (kfault.clear(slot), group.refusals()) == (rounds + 1, rounds + 1)
        return {"held and released": rounds, "of": rounds}


def hold_in_the_move() -> dict[str, Any]:
    """Places that no lock and no vCPU can stop a move at: before the source's vCPUs are locked, by a name that the
    compiler has changed or a newer kernel has another for, and half-way through the commit."""
    places = {"sev_lock_vcpus_for_migration": 2, "sev_init_vmcb": 1, "sev_unlock_vcpus_for_migration": 1}
    seen = {}
    for function, nth in places.items():
        with Group("from") as source, Group("to") as destination:
            with Child(_Mover(destination), source) as child, Kfault.open() as kfault:
                assert child.ask() == "charged"
                slot = kfault.hold(function, nth=nth, pid=child.pid)
                child.go()
                kfault.wait_reached(slot, within=5, watch=[child.pid])
                held = (source.charges(), destination.charges())
                kfault.release(slot)
                assert child.answer() == "moved"
                seen[slot.function] = [held, (source.charges(), destination.charges())]
    assert len(seen) == len(places) and all(figures == [(1, 1), (0, 1)] for figures in seen.values()), seen
    assert set(seen) != set(places), "every name was there as it was asked for: the test has lost its point"
    return seen


def killed_while_held() -> dict[str, Any]:
    """SIGKILL ends a task that is held, and one that is delayed; what it had begun is undone as it goes."""
    ended = {}
    for verb in ("hold", "delay"):
        with Group("killed") as group, Child(_init, group) as child, Kfault.open() as kfault:
            if verb == "hold":
                slot = kfault.hold("misc_cg_try_charge", pid=child.pid)
            else:
                slot = kfault.delay("misc_cg_try_charge", microseconds=600_000_000, pid=child.pid)
            child.go()
            reached = kfault.wait_reached(slot, within=5)
            child.kill()
            assert child.ended(5)
            killed = kfault.wait(slot, Happening.KILLED, call=reached.call, within=1)
            assert killed is not None and group.charges() == 0
            ended[verb] = (killed.ns - reached.ns) / 1e6
    return {"ms from reached to killed": ended}


def closing_releases() -> dict[str, Any]:
    """The file is the owner: its close lets the task go on, and so does SIGKILL of the process that had it open."""
    with Child(_init_again) as child:
        kfault = Kfault.open()
        slot = kfault.hold("misc_cg_try_charge", pid=child.pid)
        child.go()
        kfault.wait_reached(slot, within=5)
        kfault.close()
        assert child.answer(5) == "charged"

    with Child(_try_mirror) as child, Child(lambda _: _own_hold(child.pid)) as owner:
        owner.go()
        assert owner.answer() == "armed"
        child.go()
        assert owner.ask() == "reached"
        assert child.asleep()
        owner.kill()
        assert owner.ended(5)
        assert child.answer(5) == errno.EBADF
    return {}


_held: list[tuple[Kfault, Any]] = []


def _own_hold(pid: int) -> str:
    if not _held:
        kfault = Kfault.open()
        _held.append((kfault, kfault.hold("sev_vm_copy_enc_context_from", pid=pid)))
        return "armed"
    kfault, slot = _held[0]
    kfault.wait_reached(slot, within=5)
    return "reached"


def ends_of_processes() -> dict[str, Any]:
    """A process can be held in its own end, by another; by itself it is not, or it would be there for ever."""

    def arm_against_myself(vms: Vms) -> str:
        vms.init(vms.create())
        kfault = Kfault.open()
        vms.init(vms.create())  # one before it, one behind: in which order an end closes files is nobody's promise
        kfault.hold("kvm_vm_release", times=EVERY)
        kfault.hold("misc_cg_uncharge", times=EVERY)
        _held.append((kfault, None))
        return "armed"

    with Child(arm_against_myself) as child:
        assert child.ask() == "armed"
        child.kill()
        assert child.ended(5), "held in its own end by a file that it alone has open"

    with Group("dying") as group, Child(_init, group) as child, Kfault.open() as kfault:
        assert child.ask() == "charged"
        slot = kfault.hold("kvm_vm_release", pid=child.pid)
        child.kill()
        kfault.wait_reached(slot, within=5)
        assert not child.ended(0.2) and group.charges() == 1
        kfault.release(slot)
        assert child.ended(5) and group.charges() == 0
    return {}


def delay() -> dict[str, Any]:
    with Child(_try_mirror) as child, Kfault.open() as kfault:
        took = []
        for microseconds in (1, 50_000):
            slot = kfault.delay("sev_vm_copy_enc_context_from", microseconds=microseconds, pid=child.pid)
            assert child.ask() == errno.EBADF
            reached = kfault.wait_reached(slot, within=1)
            done = kfault.wait(slot, Happening.DELAYED, within=1)
            assert done is not None and microseconds * 1000 <= done.ns - reached.ns < 2e9
            took.append((done.ns - reached.ns) / 1e6)
            kfault.clear(slot)
        return {"ms for 0.001 and 50": took}


def counting() -> dict[str, Any]:
    """The nth call and `times` from there; only the calls of the process it is for; what is not read is counted."""
    with Child(_try_mirror) as child, Child(_try_mirror) as other, Kfault.open() as kfault:
        slot = kfault.returns("sev_vm_copy_enc_context_from", value=-errno.EOPNOTSUPP, nth=3, times=2, pid=child.pid)
        answers = [child.ask() for _ in range(6) if other.ask() == errno.EBADF]
        assert answers == [errno.EBADF] * 2 + [errno.EOPNOTSUPP] * 2 + [errno.EBADF] * 2, answers
        assert kfault.clear(slot) == 6
        calls = [event.call for event in kfault.log if event.what is Happening.RETURNED]
        assert calls == [3, 4], calls

        slot = kfault.returns("sev_vm_copy_enc_context_from", value=-errno.EOPNOTSUPP, times=EVERY)
        for _ in range(200):
            child.ask()
            other.ask()
        assert kfault.clear(slot) == 400
        told = [event for event in kfault.log if event.what is Happening.RETURNED][2:]
        assert len(told) + kfault.log[-1].lost == 400, (len(told), kfault.log[-1])
        return {"told": len(told), "lost": kfault.log[-1].lost}


def not_reached_says_where() -> dict[str, Any]:
    with Child(_init) as child, Kfault.open() as kfault:
        slot = kfault.hold("sev_vm_move_enc_context_from", pid=child.pid)
        try:
            kfault.wait_reached(slot, within=0.2)
        except NotReached as error:
            assert "state S, system call 45" in str(error) and "unix" in str(error), str(error)
            return {"said": str(error)}
        raise AssertionError("it was said to be reached")


def refusals() -> dict[str, Any]:
    """What is not on the list is refused, unless forced, and what nobody could do is refused even then."""
    symbols = kallsyms()
    assembly = next(name for name in ("clear_page_orig", "__sw_hweight64") if copies(name, symbols))
    with Kfault.open() as kfault:

        def tried(verb: str, function: str, **options: Any) -> int:
            try:
                kfault.clear(getattr(kfault, verb)(function, **options))
            except Refused as error:
                return error.errno
            return 0

        unforced = [
            tried("hold", "__send_signal_locked"),
            tried("hold", "no_such_function"),
            tried("returns", "sev_lock_two_vms", value=0),
            tried("returns", "sev_lock_two_vms", value=-errno.EINTR),
            tried("returns", "sev_vm_destroy", value=0),
            tried("hold", "sev_migrate_from"),  # on the list, but every compiler has inlined it
            tried("hold", "misc_cg_try_charge", pid=0x7FFFFFFF),
        ]
        FORCE.write_text("1")
        try:
            forced = [
                tried("hold", "__send_signal_locked"),
                tried("hold", "no_such_function"),
                tried("hold", assembly),  # no place for ftrace
                tried("returns", "sev_lock_two_vms", value=0),
            ]
        finally:
            FORCE.write_text("0")
        for _ in range(8):
            kfault.hold("misc_cg_uncharge")
        full = tried("hold", "misc_cg_uncharge")
    assert unforced == [errno.EPERM, errno.EPERM, errno.EPERM, 0, errno.EPERM, errno.ENOENT, errno.ESRCH], unforced
    assert forced == [0, errno.ENOENT, errno.EOPNOTSUPP, 0], forced
    assert full == errno.ENOSPC
    return {}


def functions_there() -> dict[str, Any]:
    """Which functions of the list can be held on this kernel; the host compares that with the manual."""
    names = re.findall(r'{ "(\w+)"', LIST.read_text())
    there = []
    with Kfault.open() as kfault:
        for name in names:
            try:
                slot = kfault.hold(name)
            except Refused as error:
                assert error.errno == errno.ENOENT, error
            else:
                kfault.clear(slot)
                there += [name] * (base_name(slot.function) == name)  # and not another in its place
    return {"there": there}


def atomic_is_not_held() -> dict[str, Any]:
    """A call under a spinlock is told of and let pass: here one that sends a signal."""
    with Child(_try_mirror) as child, Kfault.open() as kfault:
        FORCE.write_text("1")
        try:
            slot = kfault.hold("__send_signal_locked", pid=os.getpid())
        finally:
            FORCE.write_text("0")
        os.kill(child.pid, signal.SIGTERM)
        assert child.ended(5)
        assert kfault.wait(slot, Happening.ATOMIC, within=1) is not None
        assert not [event for event in kfault.log if event.what is Happening.REACHED]
    return {}


def beside_the_tracer() -> dict[str, Any]:
    """A function that is traced already is probed as well and let go, and can be disarmed by the tracer after that.

    Whether it was is in the kernel's log ("Failed to disarm"), and in what the next call of the function runs into.
    """
    tracer = tracefs.make()
    with Child(_init_again) as child:
        with Kfault.open() as kfault:
            slot = kfault.returns("misc_cg_try_charge", value=-errno.EBUSY, pid=child.pid)
            refused = child.ask()
            assert kfault.wait(slot, Happening.RETURNED, within=1) is not None
        tracer.remove()
        assert (refused, child.ask()) == (errno.EBUSY, "charged")
    return {}


CHECKS = (
    charge_skipped, uncharge_skipped, charge_refused, hold_a_hundred_times, hold_in_the_move, killed_while_held,
    closing_releases, ends_of_processes, delay, counting, not_reached_says_where, refusals, functions_there,
    atomic_is_not_held, beside_the_tracer,
)  # fmt: skip
