# SPDX-License-Identifier: Apache-2.0
"""What is read from /proc, /dev/kmsg and the host, and faults found by name."""

from __future__ import annotations

import os
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import pytest

from chaos import fault
from chaos.cgroup.group import Cgroup
from chaos.errors import HostLacks, UsageError
from chaos.kvm.numbers import IOCTL_NAMES
from chaos.kvm.sev import Platform
from chaos.linux import task
from chaos.linux.kmsg import KernelLog, Lost, lockdep_off, parse, rearm
from chaos.linux.loop import Loop, TimedOut
from chaos.linux.patience import patience
from chaos.linux.task import Sleeper
from chaos.runner import kernel_objects
from chaos.runner.holds import places
from chaos.runner.observer import Observer
from chaos.runner.recorder import Recorder
from chaos.safety.survey import Paths, Surveyed, allowance, foreign_guests, full_version, refuse_fragile, survey, taken
from faults.vmm import Kill

# Texts of a move that waited for a running vCPU, as both kernels of the lab show them.
MOVE_CALL = "16 0x6 0x4068aea3 0x7f661f4d6090 0x0 0x0 0x7f661f9d2d80 0x7f661f3fd610 0x7f6620174d6b\n"
STACK = """\
[<0>] sev_lock_vcpus_for_migration.constprop.0+0x66/0x150 [kvm_amd]
[<0>] sev_vm_move_enc_context_from+0x2b2/0x800 [kvm_amd]
[<0>] kvm_vm_ioctl+0x1315/0x18b0 [kvm]
"""


def pretend(proc: Path, state: str, wchan: str, stack: str, call: str) -> Path:
    path = proc / "10" / "task" / "11"
    path.mkdir(parents=True)
    for name, text in {
        "stat": f"11 (a (strange) name) {state} 1 1", "wchan": wchan, "stack": stack, "syscall": call
    }.items():  # fmt: skip
        (path / name).write_text(text)
    return path


def test_a_move_that_waits_for_a_vcpu_is_held(tmp_path: Path) -> None:
    pretend(tmp_path, "D", "sev_lock_vcpus_for_migration.constprop.0", STACK, MOVE_CALL)
    sleeper = task.look(10, 11, tmp_path, ioctls=IOCTL_NAMES)
    assert sleeper is not None
    assert sleeper.stack == ("sev_lock_vcpus_for_migration", "sev_vm_move_enc_context_from", "kvm_vm_ioctl")
    assert sleeper.sleeping == "sev_lock_vcpus_for_migration"
    assert places.waits(sleeper, "vcpu-running")
    assert "state D, ioctl KVM_ENABLE_CAP, sleeping in sev_lock" in str(sleeper)


@pytest.mark.parametrize(
    ("state", "wchan", "call"),
    [
        ("R", "0", "running\n"),
        ("S", "sev_lock_vcpus_for_migration", MOVE_CALL),
        ("D", "sev_lock_vcpus_for_migration", MOVE_CALL.replace("0x4068aea3", "0xae80")),
        ("D", "sev_lock_vcpus_for_migration", MOVE_CALL.replace("16 ", "1 ", 1)),
        ("D", "sev_lock_two_vms", MOVE_CALL),
        ("D", "folio_wait_bit_common", "-1 0x7f 0x7f\n"),
    ],
)
def test_a_thread_anywhere_else_is_not_held(tmp_path: Path, state: str, wchan: str, call: str) -> None:
    pretend(tmp_path, state, wchan, "", call)
    sleeper = task.look(10, 11, tmp_path)
    assert sleeper is not None and not places.waits(sleeper, "vcpu-running")


PAGE_CALL = MOVE_CALL.replace("0x4068aea3", "0xc008aeba")


@pytest.mark.parametrize(
    ("state", "wchan", "call", "waits"),
    [
        ("S", "handle_userfault", PAGE_CALL, True),
        ("D", "handle_userfault", PAGE_CALL, True),
        ("R", "handle_userfault", PAGE_CALL, False),
        ("S", "handle_userfault", MOVE_CALL, False),
        ("S", "handle_userfault", "-1 0x7f 0x7f\n", False),  # a fault of its own, in no call
        ("D", "sev_lock_two_vms", PAGE_CALL, False),
    ],
)
def test_a_command_that_waits_for_its_arguments(tmp_path: Path, state: str, wchan: str, call: str, waits: bool) -> None:
    pretend(tmp_path, state, wchan, "", call)
    sleeper = task.look(10, 11, tmp_path)
    assert sleeper is not None and places.waits_for_page(sleeper) is waits


@pytest.mark.parametrize(
    ("call", "called"),
    [
        (MOVE_CALL, "ioctl KVM_ENABLE_CAP"),
        (MOVE_CALL.replace("0x4068aea3", "0x1234"), "ioctl 0x1234"),
        (MOVE_CALL.replace("16 ", "202 ", 1), "system call 202"),
        ("running\n", ""),
    ],
)
def test_a_system_call_by_its_name(tmp_path: Path, call: str, called: str) -> None:
    pretend(tmp_path, "S", "x", STACK, call)
    sleeper = task.look(10, 11, tmp_path, ioctls=IOCTL_NAMES)
    assert sleeper is not None and sleeper.called == called
    way = "(sev_lock_vcpus_for_migration < sev_vm_move_enc_context_from < kvm_vm_ioctl)"
    assert str(sleeper) == f"state S, {called or 'no system call'}, sleeping in x {way}"


def test_the_stack_stands_in_where_wchan_tells_nothing(tmp_path: Path) -> None:
    pretend(tmp_path, "D", "0", STACK, MOVE_CALL)
    sleeper = task.look(10, 11, tmp_path)
    assert sleeper is not None and places.waits(sleeper, "vcpu-running")


def test_what_may_not_be_read_is_not_known(tmp_path: Path) -> None:
    path = pretend(tmp_path, "D", "x", "", MOVE_CALL)
    for name in ("wchan", "stack", "syscall"):
        (path / name).unlink()
    assert task.look(10, 11, tmp_path) == Sleeper(state="D")


def test_a_thread_that_is_gone_is_none(tmp_path: Path) -> None:
    assert task.look(10, 11, tmp_path) is None


def test_a_real_thread_can_be_looked_at() -> None:
    sleeper = task.look(os.getpid(), threading.get_native_id())
    assert sleeper is not None and sleeper.state in "RS"


# -- the kernel's log -------------------------------------------------------------------------------------


def test_a_record_of_the_kernels_log() -> None:
    line = parse(b"4,1234,54661030,-;misc cgroup resource sev became less than 0\n SUBSYSTEM=misc\n")
    assert line is not None
    assert (line.level, line.t, line.text) == (4, 54661030000, "misc cgroup resource sev became less than 0")


def test_the_log_reader_hears_only_its_own_signature(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.write_text("")
    log = KernelLog(path)
    log.sign()
    written = path.read_text().removeprefix("<15>")  # facility user, level debug: no console shows it
    assert str(os.getpid()) in written and not written.startswith("<")
    # As the kernel would give it back, between a line of its own and a signature of somebody else's reader.
    other = written.replace(f"({os.getpid()}.", "(1.")
    for record, heard in ((f"12,1,1,-;{other}", 0), ("4,2,2,-;kernel\n", 0), (f"15,3,3,-;{written}", 1)):
        path.write_text("")
        os.lseek(log.fd.number, 0, os.SEEK_SET)
        path.write_text(record)
        with pytest.raises(Lost):  # a plain file ends, which the log never does
            list(log.lines(lambda lost: None))
        assert (log.signed, log.heard) == (1, heard)
        assert (log.ahead is None) == (heard == 0)
    log.close()


def test_how_far_the_logs_clock_is_behind_is_told_by_its_own_lines(tmp_path: Path) -> None:
    """The line was written between two looks at the clock, and that is as well as it can be told."""
    path = tmp_path / "kmsg"
    path.write_text("")
    log = KernelLog(path)
    before = time.monotonic_ns()
    log.sign()
    after = time.monotonic_ns()
    signature = path.read_text().removeprefix("<15>")
    path.write_text(f"15,1,5000000,-;{signature}")
    os.lseek(log.fd.number, 0, os.SEEK_SET)
    with pytest.raises(Lost):
        list(log.lines(lambda lost: None))
    assert log.ahead is not None and before <= log.ahead + 5_000_000_000 <= after
    log.close()


def test_what_the_kernel_warns_of_once_is_armed_again(tmp_path: Path) -> None:
    tainted = tmp_path / "tainted"
    tainted.write_text("12288\n")  # out of tree and unsigned modules: it has not warned
    assert rearm(tainted, tmp_path / "none") == ""
    tainted.write_text("512\n")
    assert "cannot be armed again" in rearm(tainted, tmp_path / "none")
    assert rearm(tainted, tmp_path) == "" and (tmp_path / "clear_warn_once").read_text() == "1"


@pytest.mark.parametrize(("debug_locks", "off"), [(1, False), (0, True)])
def test_lockdep_that_gave_its_one_report_tells_no_more(tmp_path: Path, debug_locks: int, *, off: bool) -> None:
    assert lockdep_off(tmp_path) == ""
    (tmp_path / "lockdep_stats").write_text(
        f" max lockdep depth: 9\n debug_locks:                   {debug_locks:>11}\n"
    )
    assert lockdep_off(tmp_path).startswith("lockdep has turned itself off") == off


def records_of(path: Path, monkeypatch: pytest.MonkeyPatch, *records: str) -> KernelLog:
    """A log that gives a record a read, and then has no more, as /dev/kmsg does."""
    waiting = [record.encode() for record in records]

    def read(fd: int, size: int) -> bytes:
        if not waiting:
            raise BlockingIOError
        return waiting.pop(0)

    path.write_text("")
    monkeypatch.setattr(os, "read", read)
    return KernelLog(path)


OTHERS = "15,5,5,-;sevchaos: the reader of this log is at work (1.2)\n"


def test_what_was_said_since_an_earlier_run_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ("4,1,1,-;before any\n", OTHERS, "4,6,6,-;in it\n", OTHERS, "4,7,7,-;after\n", "12,8,8,-;a process\n")
    log = records_of(tmp_path / "kmsg", monkeypatch, *said)
    assert [line.text for line in log.lines(lambda lost: None)] == ["after"]
    log.close()


def test_what_was_said_since_an_earlier_run_is_there_once_after_the_clocks_were_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a log with such a line the comparison took the same line again and again, until the runner was out of
    memory."""
    log = records_of(tmp_path / "kmsg", monkeypatch, OTHERS, "4,7,7,-;after\n")
    log.compare(lambda lost: None)
    assert [line.text for line in log.lines(lambda lost: None)] == ["after"]
    log.close()


def test_what_was_said_before_any_run_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = records_of(tmp_path / "kmsg", monkeypatch, "4,1,1,-;booting\n", "4,2,2,-;WARNING: CPU: 0 PID: 1 at a.c:1 b\n")
    assert not list(log.lines(lambda lost: None))
    log.close()


def test_how_long_a_kernel_waits_before_it_reports_what_hangs(tmp_path: Path) -> None:
    kernel, rcu = tmp_path / "sys" / "kernel", tmp_path / "rcupdate" / "parameters"
    assert set(patience(tmp_path, tmp_path).values()) == {0}  # such a host reports nothing
    kernel.mkdir(parents=True)
    rcu.mkdir(parents=True)
    for name, number in {
        "hung_task_timeout_secs": 5, "hung_task_warnings": -1, "watchdog_thresh": 10, "watchdog": 1,
        "soft_watchdog": 1, "nmi_watchdog": 0,
    }.items():  # fmt: skip
        (kernel / name).write_text(f"{number}\n")
    (rcu / "rcu_cpu_stall_timeout").write_text("21\n")
    (rcu / "rcu_cpu_stall_suppress").write_text("0\n")
    found = {"hung task": 5, "soft lockup": 20, "hard lockup": 0, "RCU stall": 21}
    assert patience(tmp_path, tmp_path) == found
    (kernel / "hung_task_warnings").write_text("0\n")  # it has given them all
    (rcu / "rcu_cpu_stall_suppress").write_text("1\n")
    assert patience(tmp_path, tmp_path) == {**found, "hung task": 0, "RCU stall": 0}


def test_what_processes_write_is_not_the_kernels() -> None:
    assert not parse(b"12,1,1,-;sevchaos: hello\n").kernel  # facility 1
    assert parse(b"4,1,1,-;hello\n").kernel
    first = parse(b"6,1,1,c;a; b, c\n")
    assert first is not None and first.text == "a; b, c"


@pytest.mark.parametrize("record", [b"", b"6,1;x", b"x,1,1,-;y", b"no separator"])
def test_what_is_no_record_says_so(record: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(record)


def test_the_log_of_this_machine_can_be_read_from_its_end() -> None:
    try:
        log = KernelLog()
    except OSError as error:
        pytest.skip(f"no log here: {error}")
    assert all(line.text for line in log.lines(lambda lost: None))
    log.close()


def test_a_log_that_is_none_is_lost(tmp_path: Path) -> None:
    (tmp_path / "kmsg").write_text("")
    log = KernelLog(tmp_path / "kmsg")
    with pytest.raises(Lost):
        list(log.lines(lambda lost: None))
    log.close()


# -- the host ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "version", "full"),
    [
        ("6.1.0-56-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-01)", "6.1.192"),
        ("6.12.117+deb12-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1~deb12u1 (2026-11-14)", "6.12.117"),
        ("5.15.0-91-generic", "Ubuntu 5.15.0-91.101-generic 5.15.131\n", "5.15.131"),
        ("6.18.44-fc-v669", "#1 SMP PREEMPT_DYNAMIC @0", "6.18.44"),
        ("7.3.0-rc5+", "#3 SMP Thu Oct 1 10:00:00 UTC 2026", "7.3.0"),
        ("6.12", "#1", "6.12"),
    ],
)
def test_full_versions(release: str, version: str, full: str) -> None:
    assert full_version(release, version) == full


LOCAL = Surveyed(name="local", release="", kernel="", asids={"sev": 410, "sev_es": 99, "odd": 2})


def charged(path: Path, current: str) -> Cgroup:
    path.mkdir(exist_ok=True)
    (path / "misc.current").write_text(current)
    return Cgroup.at(path)


@pytest.mark.parametrize(
    ("current", "allowed"),
    [
        ("sev 10\n", {"sev": 300, "sev_es": 74, "odd": 2}),
        ("sev 409\nodd 2\n", {"sev": 1, "sev_es": 74, "odd": 0}),
    ],
)
def test_a_real_host_keeps_a_reserve(tmp_path: Path, current: str, allowed: dict[str, int]) -> None:
    assert allowance(LOCAL, charged(tmp_path, current)) == allowed


def test_where_the_root_tells_no_charge_those_below_it_are_added_up(tmp_path: Path) -> None:
    """The root has no misc.current before 6.12."""
    charged(tmp_path / "machine.slice", "sev 8\nsev_es 1\n")
    charged(tmp_path / "system.slice", "sev 2\nsev_es 0\n")
    (tmp_path / "init.scope").mkdir()  # without the controller
    assert taken(Cgroup.at(tmp_path)) == {"sev": 10, "sev_es": 1}
    assert allowance(LOCAL, Cgroup.at(tmp_path))["sev"] == 300


def test_nothing_is_withheld_in_the_lab(tmp_path: Path) -> None:
    lab = Surveyed(name="lab", release="", kernel="", asids={"sev": 8})
    assert allowance(lab, charged(tmp_path, "sev 0\n")) == {}


def test_our_own_guests_are_not_foreign(tmp_path: Path) -> None:
    root = charged(tmp_path, "sev 5\nsev_es 2\n")
    assert foreign_guests(root, None) == 7
    charged(tmp_path / "sevchaos", "sev 5\nsev_es 0\n")
    assert foreign_guests(root, None) == 2


class Firmware:
    """A platform that says how many guests it has."""

    def __init__(self, guests: int) -> None:
        self.guest_count = guests

    def status(self) -> Firmware:
        return self


@pytest.mark.parametrize(("launched", "foreign"), [(0, 3), (2, 3), (4, 4)])
def test_before_the_root_tells_the_witness_who_saw_more_is_believed(
    tmp_path: Path, launched: int, foreign: int
) -> None:
    charged(tmp_path / "machine.slice", "sev 3\n")
    charged(tmp_path / "sevchaos", "sev 5\n")
    assert foreign_guests(Cgroup.at(tmp_path), cast("Platform", Firmware(launched))) == foreign


def test_a_host_that_nobody_can_ask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostLacks, match="whether other SEV guests"):
        foreign_guests(Cgroup.at(tmp_path), None)


# -- faults -----------------------------------------------------------------------------------------------


def test_a_fault_is_found_with_its_options() -> None:
    assert "kill" in fault.names()
    assert fault.find("kill", {}) == Kill(signal="KILL")
    assert fault.find("kill", {"signal": "TERM"}) == Kill(signal="TERM")


@pytest.mark.parametrize(
    ("name", "options", "problem", "remedy"),
    [
        ("typo", {}, "no fault 'typo'", "kill"),
        ("kill", {"signal": "HUP"}, "there is no such choice .it is 'HUP'.", "signal"),
        ("kill", {"sig": "KILL"}, "has no option 'sig'", "signal"),
        ("kill", {"signal": 9}, "signal", "signal"),
    ],
)
def test_a_wrong_fault_is_refused_with_what_is_allowed(
    name: str, options: dict[str, object], problem: str, remedy: str
) -> None:
    with pytest.raises(UsageError, match=problem) as refused:
        fault.find(name, options)
    assert remedy in refused.value.remedy


# -- waiting ----------------------------------------------------------------------------------------------


def test_waiting_ends_with_a_word_for_what_was_waited_for() -> None:
    with pytest.raises(TimedOut, match=r"waited 0\.01 s for the moon"):
        Loop().wait(lambda: False, 0.01, "the moon")


def test_a_handler_may_take_off_another_of_the_same_turn() -> None:
    loop = Loop()
    heard: list[int] = []
    pipes = [os.pipe() for _ in range(2)]
    for reader, writer in pipes:
        os.write(writer, b"x")

        def hear(mine: int = reader) -> None:
            heard.append(mine)
            for other, _ in pipes:
                loop.forget(other)

        loop.watch(reader, hear)
    loop.turn(0)
    loop.turn(0)
    assert len(heard) == 1


def test_a_lab_is_known_by_its_shim_whatever_the_order_says(tmp_path: Path) -> None:
    paths = Paths(proc=tmp_path, modules=tmp_path / "module")
    assert survey("local", paths, None).executes_es
    (tmp_path / "module" / "sevshim").mkdir(parents=True)
    assert not survey("local", paths, None).executes_es


def test_pages_are_counted_once_every_cpu_has_said_what_it_kept_to_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        kernel_objects.vmstat(tmp_path)
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "sys/vm/stat_refresh").touch()
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 7\n")
    stat = kernel_objects.vmstat(tmp_path)
    assert kernel_objects.pinned(stat) is None and kernel_objects.tables(stat) is None
    vmstat.write_text("nr_foll_pin_acquired 12\nnr_foll_pin_released 9\nnr_sec_page_table_pages 4\n")
    stat = kernel_objects.vmstat(tmp_path)
    assert (kernel_objects.pinned(stat), kernel_objects.tables(stat)) == (3, 4)
    (tmp_path / "sys/vm/stat_refresh").unlink()
    with pytest.raises(FileNotFoundError):
        kernel_objects.vmstat(tmp_path)


def test_vms_are_the_folders_of_kvms_debugfs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        kernel_objects.vms(tmp_path)
    for folder in ("kvm/71-9/vcpu0", "kvm/71-9/vcpu1", "kvm/72-kvm-vm"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "kvm/halt_exits").touch()
    (tmp_path / "kvm/71-9/halt_exits").touch()
    assert kernel_objects.vms(tmp_path) == {"71-9": 2, "72-kvm-vm": 0}


def test_objects_are_counted_in_caches_that_are_kvms_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        kernel_objects.objects(tmp_path)
    for cache, aliases in (("kvm_vcpu", 0), ("kvm_mmu_page_header", 2)):
        (tmp_path / cache).mkdir()
        (tmp_path / cache / "aliases").write_text(f"{aliases}\n")
        (tmp_path / cache / "objects").write_text("3 N0=3\n")
    assert kernel_objects.objects(tmp_path) == {"kvm_vcpu": 3}
    assert (tmp_path / "kvm_vcpu/shrink").read_text() == "1"


def test_references_are_those_to_modules(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        kernel_objects.references(tmp_path)
    (tmp_path / "kvm_amd").mkdir()
    (tmp_path / "kvm_amd/refcnt").write_text("2\n")
    (tmp_path / "ccp").mkdir()  # part of the kernel: nobody counts
    assert kernel_objects.references(tmp_path) == {"kvm_amd": 2}


def test_what_a_host_does_not_show_is_recorded_with_the_reason(tmp_path: Path) -> None:
    group = Cgroup.at(tmp_path)
    (tmp_path / "cgroup.stat").write_text("nr_descendants 0\nnr_dying_descendants 0\n")
    (tmp_path / "debug/kvm").mkdir(parents=True)
    paths = Paths(proc=tmp_path / "proc", debug=tmp_path / "debug", slab=tmp_path / "slab", modules=tmp_path / "module")
    sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    observer = Observer(Recorder(sink), group, None, lambda _: None, paths=paths)
    plain = observer.observe("middle", 3)
    assert plain.vms is None and plain.unseen == {}
    seen = observer.observe("end", 4, whole_host=True)
    assert seen.vms == {} and seen.objects is None and seen.tables is None and seen.pinned is None
    assert set(seen.unseen) == {"objects", "references", "tables", "dying_misc", "eventfds"}
    assert seen.unseen["objects"] == f"{tmp_path / 'slab'}: No such file or directory"
    assert seen.unseen["dying_misc"] == "this kernel does not count them"
    (tmp_path / "cgroup.stat").write_text("nr_dying_descendants 0\nnr_dying_subsys_misc 2\n")
    assert observer.observe("end", 5, whole_host=True).dying_misc == 2
    os.close(sink)


@pytest.mark.parametrize(("said", "refused"), [("1\n", True), ("0\n", False), (None, False)])
def test_a_machine_that_panics_on_a_warning_is_refused(tmp_path: Path, said: str | None, refused: bool) -> None:
    if said is not None:
        setting = tmp_path / "sys/kernel/panic_on_warn"
        setting.parent.mkdir(parents=True)
        setting.write_text(said)
    with pytest.raises(HostLacks, match="panics when its kernel warns") if refused else nullcontext():
        refuse_fragile(Paths(proc=tmp_path))


def test_eventfds_are_counted_among_the_lowest_numbers(tmp_path: Path) -> None:
    proc = Path("/proc")
    before = kernel_objects.eventfds(proc)
    assert before >= 0
    with pytest.raises(FileNotFoundError):
        kernel_objects.eventfds(tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "fdinfo").symlink_to(tmp_path)
    for fd in range(kernel_objects.PROBES * 4):
        (tmp_path / str(fd)).write_text(f"eventfd-count: 0\neventfd-id: {kernel_objects.PROBES + 6}\n")
    assert kernel_objects.eventfds(tmp_path) == 7


KMEMLEAK = """unreferenced object 0xffff888003d4e000 (size 4096):
  comm "python3", pid 211, jiffies 4294761234
  hex dump (first 32 bytes):
    00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00  ................
  backtrace (crc 0):
    [<00000000fe1c4d9f>] __kmalloc_noprof+0x2b1/0x3a0
    [<00000000a1c4d9fe>] sev_vm_move_enc_context_from.isra.0+0x95/0x8e0 [kvm_amd]
    kvm_vm_ioctl_enable_cap+0x10/0x20 [kvm]
unreferenced object 0xffff888003d4f000 (size 8):
  comm "python3", pid 211, jiffies 4294761235
  backtrace (crc 0):
"""


def test_kmemleak_tells_where_what_is_lost_was_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "kmemleak"
    written: list[str] = []

    class Kmemleak(type(said)):  # type: ignore[misc]
        def write_text(self, text: str) -> None:
            written.append(text)

    said.write_text(KMEMLEAK)
    monkeypatch.setattr(time, "sleep", lambda seconds: written.append(f"{seconds:g} s"))
    witness = kernel_objects.LeakWitness()
    look = ["scan", "scan", "clear"]
    for before in (look, []):  # a second run need not look again before it begins
        written.clear()
        witness.begin(Kmemleak(said))
        assert written == before
        assert witness.end(Kmemleak(said)) == (
            "__kmalloc_noprof < sev_vm_move_enc_context_from.isra.0 < kvm_vm_ioctl_enable_cap",
            "(no backtrace)",
        )
        assert written == [*before, "6 s", "scan", *look]
    for _ in range(2):  # one that did not come to its end has not looked
        written.clear()
        witness.begin(Kmemleak(said))
    assert written == look
    with pytest.raises(FileNotFoundError):
        kernel_objects.leaks(tmp_path / "none" / "kmemleak", age=0)


def test_what_was_lost_before_the_script_is_not_this_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.stat").write_text("nr_dying_descendants 0\n")
    (tmp_path / "kmemleak").write_text(KMEMLEAK)
    monkeypatch.setattr(kernel_objects, "leaks", lambda kmemleak: (kmemleak.read_text(),))
    sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    paths = Paths(proc=tmp_path, debug=tmp_path, slab=tmp_path, modules=tmp_path)
    observer = Observer(Recorder(sink), Cgroup.at(tmp_path), None, lambda _: None, paths=paths)
    assert observer.observe("start", -1, whole_host=True).leaked == ()
    assert observer.observe("middle", 2).leaked is None
    assert observer.observe("end", 4, whole_host=True).leaked == ("clear",)
    os.close(sink)
