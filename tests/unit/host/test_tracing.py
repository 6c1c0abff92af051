# SPDX-License-Identifier: Apache-2.0
"""What the kernel's tracer says, and our corner of tracefs, on files that stand in for it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.history import records
from chaos.history.records import Note, Traced
from chaos.linux import kallsyms, tracefs
from chaos.linux.loop import Loop
from chaos.linux.tracefs import NoTracing
from chaos.runner import tracing
from chaos.runner.recorder import Recorder
from chaos.runner.tracing import Damaged, EventsLost, KernelEvent, Made, Tracer, parse

# As both kernels of the lab show them.
CHARGE = (
    "          python3-345   [001] .....   120.505123: misc_cg_try_charge_enter: "
    "(misc_cg_try_charge+0x4/0x110) type=1 css=0xffff888003cf3600 amount=1"
)
CHARGED = (
    "           <...>-345   [000] ...1.   120.505131: misc_cg_try_charge_leave: "
    "(sev_vm_move_enc_context_from+0x1a0/0x800 [kvm_amd] <- misc_cg_try_charge) returned=-16"
)
LOCKED = (
    "  a (1) -b-2 c-7     [001] d..1.     7.538436: sev_lock_vcpus_for_migration_enter: "
    "(sev_lock_vcpus_for_migration.constprop.0+0x4/0x150 [kvm_amd])"
)
UNKNOWN_CALLER = "  x-9 [001] ..... 7.000001: misc_cg_alloc_leave: ([unknown/kretprobe'd] <- misc_cg_alloc) css=0xff00"
CGROUP = "  x-9     [000] d..1.     8.159197: cgroup_mkdir: root=0 id=107 level=3 path=/sevchaos/run-1-0/a b"


def test_a_charge_and_what_it_returned() -> None:
    fields = {"type": "1", "css": "0xffff888003cf3600", "amount": "1"}
    assert parse(CHARGE) == KernelEvent(120_505_123_000, 345, False, "misc_cg_try_charge", fields)
    assert parse(CHARGED) == KernelEvent(120_505_131_000, 345, True, "misc_cg_try_charge", {"returned": "-16"})


def test_a_thread_may_have_any_name_and_a_function_what_a_compiler_appends() -> None:
    assert parse(LOCKED) == KernelEvent(7_538_436_000, 7, False, "sev_lock_vcpus_for_migration", {})


def test_a_caller_that_the_tracer_cannot_name_and_a_cgroup_with_a_blank() -> None:
    assert parse(UNKNOWN_CALLER) == KernelEvent(7_000_001_000, 9, True, "misc_cg_alloc", {"css": "0xff00"})
    assert parse(CGROUP) == Made(9, "/sevchaos/run-1-0/a b")


def test_lost_events_are_told() -> None:
    assert parse("CPU:1 [LOST 12 EVENTS]") == EventsLost(12)
    assert parse("CPU:0 [LOST EVENTS]") == EventsLost(1)


@pytest.mark.parametrize("line", [CHARGE, CHARGED, LOCKED, UNKNOWN_CALLER, CGROUP])
def test_a_line_that_is_cut_off_is_damaged_or_says_less(line: str) -> None:
    """Never something else: whatever part is there is read as it stands."""
    whole = parse(line)
    for end in range(len(line)):
        try:
            part = parse(line[:end])
        except Damaged:
            continue
        assert isinstance(part, type(whole))
        assert not isinstance(part, KernelEvent | Made) or part.tid == getattr(whole, "tid", None)


# -- tracefs ----------------------------------------------------------------------------------------------


class Fake:
    """tracefs in a directory: kprobe_events knows some functions, and an instance has its files."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.functions = {probe.function for probe in tracefs.PROBES}
        self.refuses = 0
        (root / "instances").mkdir()
        for name in ("kprobe_events", "kprobe_profile"):
            (root / name).touch()
        self._write, self._create = tracefs._write, tracefs._create
        monkeypatch.setattr(tracefs, "_write", self.write)
        monkeypatch.setattr(tracefs, "_create", self.create)
        monkeypatch.setattr(tracefs, "_delete", shutil.rmtree)
        monkeypatch.setattr(kallsyms, "kallsyms", self.symbols)

    def symbols(self) -> str:
        return "".join(f"ff t {name}\t[kvm_amd]\n" for name in sorted(self.functions))

    @property
    def probes(self) -> dict[str, str]:
        """The function of each event."""
        lines = (self.root / "kprobe_events").read_text().splitlines()
        return {line.split()[0].partition("/")[2]: line.split()[1] for line in lines}

    @property
    def instances(self) -> list[str]:
        return sorted(path.name for path in (self.root / "instances").iterdir())

    def write(self, path: Path, text: str) -> None:
        if path.name != "kprobe_events":
            self._write(path, text)
        elif text.startswith("-:"):
            kept = [line for line in path.read_text().splitlines() if text[2:] not in line]
            path.write_text("".join(f"{line}\n" for line in kept))
        elif self.refuses:
            raise OSError(self.refuses, os.strerror(self.refuses), str(path))
        elif text.split()[1] not in self.functions:
            raise OSError(errno.ENOENT, "no such function")
        else:
            self._write(path, text)

    def create(self, directory: Path, stem: str) -> Path:
        path: Path = self._create(directory, stem)
        for name in ("tracing_on", "trace_clock", "buffer_size_kb", "events/sevchaos/enable"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).touch()
        (path / "events/cgroup/cgroup_mkdir").mkdir(parents=True)
        (path / "events/cgroup/cgroup_mkdir/enable").touch()
        os.mkfifo(path / "trace_pipe")
        return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, monkeypatch)


def test_probes_are_made_once_and_go_with_the_last_instance(fake: Fake) -> None:
    assert tracefs.prepare(fake.root) == ()
    made = (fake.root / "kprobe_events").read_text()
    assert len(fake.probes) == len(tracefs.PROBES)
    first, second = tracefs.make(fake.root), tracefs.make(fake.root)
    assert (fake.root / "kprobe_events").read_text() == made
    first.remove()
    assert fake.instances == [second.path.name] and fake.probes
    second.remove()
    assert fake.instances == [] and not fake.probes


def test_what_a_compiler_renamed_is_found_and_what_is_not_there_is_said(fake: Fake) -> None:
    fake.functions = {"sev_lock_two_vms.isra.0", "kvm_lock_all_vcpus", "misc_cg_uncharge"}
    instance = tracefs.make(fake.root)
    assert fake.probes["sev_lock_two_vms_leave"] == "sev_lock_two_vms.isra.0"
    assert fake.probes["sev_lock_vcpus_for_migration_enter"] == "kvm_lock_all_vcpus"  # 6.16
    assert "misc_cg_try_charge" in instance.missing and "misc_cg_uncharge" not in instance.missing
    assert len(set(instance.missing)) == len(instance.missing)


def test_probes_of_another_version_are_made_anew(fake: Fake) -> None:
    (fake.root / "kprobe_events").write_text(
        "p:sevchaos/misc_cg_uncharge_enter misc_cg_uncharge a=%di\np:others/x vfs_read\n"
    )
    assert tracefs.prepare(fake.root) == ()
    text = (fake.root / "kprobe_events").read_text()
    assert "p:sevchaos/misc_cg_uncharge_enter misc_cg_uncharge type=%di:u32" in text and "a=%di\n" not in text
    tracefs.make(fake.root).remove()
    assert (fake.root / "kprobe_events").read_text() == "p:others/x vfs_read\n"  # not ours


def test_clean_takes_what_the_dead_left_and_spares_the_living(fake: Fake) -> None:
    alive, dead = tracefs.make(fake.root), tracefs.make(fake.root)
    assert tracefs.clean(fake.root) == ()
    dead._lock.close()  # as its process does by ending
    assert tracefs.clean(fake.root) == (dead.path,)
    assert fake.instances == [alive.path.name] and fake.probes
    alive._lock.close()
    assert tracefs.clean(fake.root) == (alive.path,)
    assert not fake.probes


def test_clean_where_there_is_no_tracefs(tmp_path: Path) -> None:
    assert tracefs.clean(tmp_path / "nothing") == ()


def test_a_host_without_or_with_a_locked_tracer(fake: Fake) -> None:
    with pytest.raises(NoTracing, match="mount tracefs"):
        tracefs.make(fake.root / "instances")
    fake.refuses = errno.EPERM
    with pytest.raises(NoTracing, match="Operation not permitted"):
        tracefs.make(fake.root)
    assert fake.instances == []


# -- a recording ------------------------------------------------------------------------------------------


class Told:
    """What a recorder was given to write."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe2(os.O_NONBLOCK)
        fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, 1 << 20)
        self._reader = os.fdopen(reader, "rb")
        self.recorder = Recorder(self._writer)

    def records(self) -> list[records.Record]:
        return [records.decode(line) for line in self._reader.readlines()]

    def close(self) -> None:
        self._reader.close()
        os.close(self._writer)


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    yield told
    told.close()


ALLOCATED = (
    "  x-9     [000] .....     8.159000: misc_cg_alloc_leave: (f+0x1/0x2 <- misc_cg_alloc) css=0xffff888003cf3600"
)
MADE = "  x-9     [000] d..1.     8.159197: cgroup_mkdir: root=0 id=107 level=3 path=/sevchaos/run-1-0/source"


def opened(fake: Fake, tmp_path: Path) -> Tracer:
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to("pid:[4026531836]")
    return Tracer.open(fake.root, tmp_path)


def traced(fake: Fake, told: Told, tmp_path: Path, *lines: str) -> list[records.Record]:
    """What is recorded of these lines."""
    tracer, loop = opened(fake, tmp_path), Loop()
    with tracer.recording(loop, told.recorder, "run-1-0"):
        (instance,) = fake.instances
        pipe = os.open(fake.root / "instances" / instance / "trace_pipe", os.O_WRONLY | os.O_NONBLOCK)
        os.write(pipe, "\n".join(lines).encode())
        loop.turn(1.0)
        os.close(pipe)
    tracer.close()
    return told.records()


def test_a_charge_names_the_cgroup_by_what_its_maker_was_seen_to_make(fake: Fake, told: Told, tmp_path: Path) -> None:
    other = CHARGE.replace("3600", "3700")
    records = traced(fake, told, tmp_path, ALLOCATED, MADE, CHARGE, other, CHARGED, "")
    assert all(isinstance(record, Traced) for record in records)
    charge = {"key": "sev_es", "amount": 1}
    values = [record.values for record in records if isinstance(record, Traced)]
    assert values == [{**charge, "cgroup": "source"}, charge, {"returned": -16}]


def test_an_address_that_is_used_again_is_another_cgroups(fake: Fake, told: Told, tmp_path: Path) -> None:
    of_another_run = MADE.replace("/run-1-0/", "/run-2-0/")
    records = traced(fake, told, tmp_path, ALLOCATED, MADE, ALLOCATED, of_another_run, CHARGE, "")
    assert [r.values for r in records if isinstance(r, Traced)] == [{"key": "sev_es", "amount": 1}]


def test_what_was_lost_damaged_or_cut_off_is_said(fake: Fake, told: Told, tmp_path: Path) -> None:
    records = traced(fake, told, tmp_path, CHARGED, "CPU:1 [LOST 12 EVENTS]", "nonsense", CHARGED[:-8])
    assert [record.text for record in records if isinstance(record, Note)] == [
        "kernel events: 12 were lost", "kernel events: 2 lines are damaged",
    ]  # fmt: skip
    assert sum(isinstance(record, Traced) for record in records) == 1


def test_calls_that_the_probes_missed_are_lost_too(fake: Fake, told: Told, tmp_path: Path) -> None:
    profile = fake.root / "kprobe_profile"
    profile.write_text("  misc_cg_try_charge_leave   10  3\n  somebody_elses   1  7\n")
    tracer, loop = opened(fake, tmp_path), Loop()
    with tracer.recording(loop, told.recorder, "run-1-0"):
        profile.write_text("  misc_cg_try_charge_leave   10  5\n  somebody_elses   1  9\n")
    assert [record.text for record in told.records() if isinstance(record, Note)] == ["kernel events: 2 were lost"]


def test_of_too_many_events_the_rest_is_left_out(
    fake: Fake, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "MOST", 3)
    records = traced(fake, told, tmp_path, *[CHARGED] * 5, "")
    assert sum(isinstance(record, Traced) for record in records) == 3
    assert [r.text for r in records if isinstance(r, Note)] == ["kernel events: more than 3; the rest is not recorded"]


def test_a_pause_is_made_said_and_over(fake: Fake, told: Told, tmp_path: Path) -> None:
    tracer = opened(fake, tmp_path)
    with tracer.recording(Loop(), told.recorder, "run") as paused:
        (instance,) = fake.instances
        switch = fake.root / "instances" / instance / "tracing_on"
        with pytest.raises(ZeroDivisionError), paused():
            assert switch.read_text().split()[-1] == "0"
            raise ZeroDivisionError
        assert switch.read_text().split()[-1] == "1"
    (note,) = (record for record in told.records() if isinstance(record, Note))
    assert "none are recorded while" in note.text
    with Tracer(None, "no tracer").recording(Loop(), told.recorder, "run") as paused, paused():
        pass


def test_why_there_are_none_is_said_in_every_run(told: Told, tmp_path: Path) -> None:
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to("pid:[1]")
    tracer = Tracer.open(tmp_path, tmp_path)
    for _ in range(2):
        with tracer.recording(Loop(), told.recorder, "run"):
            pass
    texts = [record.text for record in told.records() if isinstance(record, Note)]
    assert len(texts) == 2 and texts[0] == texts[1] and "container" in texts[0]


def test_a_tracer_that_fails_costs_its_events_and_nothing_else(fake: Fake, told: Told, tmp_path: Path) -> None:
    tracer, loop = opened(fake, tmp_path), Loop()
    with tracer.recording(loop, told.recorder, "run"):
        (fake.root / "kprobe_profile").unlink()
    with tracer.recording(loop, told.recorder, "run"):
        pass
    first, second = (record.text for record in told.records() if isinstance(record, Note))
    assert first == "kernel events: no more of them: No such file or directory"
    assert second.startswith("there are no kernel events: ")
