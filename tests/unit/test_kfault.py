# SPDX-License-Identifier: Apache-2.0
"""The user-space side of kfault: commands, events, and what is said when a hold is not reached."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.errors import ExitCode, HostLacks, InternalError, UsageError
from chaos.lab.kernel.build import SOURCES
from chaos.linux.fd import OwnedFd
from chaos.linux.kallsyms import copies
from chaos.linux.kfault import (
    Action,
    BadEvent,
    Event,
    Happening,
    Kfault,
    NotReached,
    Refused,
    arming,
    parse_event,
    whereabouts,
)
from tests.kfault_manual import manual_table

LINE = b"event=reached slot=3 action=hold function=sev_x.isra.0 pid=71 tid=72 call=4 ns=5312345678 lost=0\n"
EVENT = Event(Happening.REACHED, 3, Action.HOLD, "sev_x.isra.0", 71, 72, 4, 5312345678, 0)

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,62}", fullmatch=True)
counts = st.integers(0, (1 << 63) - 1)
events = st.builds(
    Event, st.sampled_from(Happening), st.integers(0, 7), st.sampled_from(Action), names,
    counts, counts, counts, counts, counts,
)  # fmt: skip


def line_of(event: Event) -> bytes:
    return (
        f"event={event.what} slot={event.slot} action={event.action} function={event.function} pid={event.pid}"
        f" tid={event.tid} call={event.call} ns={event.ns} lost={event.lost}\n"
    ).encode()


# -- events ---------------------------------------------------------------------------------------------------


def test_an_event() -> None:
    assert parse_event(LINE) == EVENT
    assert parse_event(LINE[:-1] + b" cpu=1") == EVENT  # a later module may say more


@given(events)
def test_what_is_said_is_understood(event: Event) -> None:
    assert parse_event(line_of(event)) == event


@given(st.one_of(st.binary(max_size=300), st.text(max_size=200).map(str.encode)))
def test_any_bytes_are_an_event_or_refused(line: bytes) -> None:
    with contextlib.suppress(BadEvent):
        parse_event(line)


@given(st.integers(0, len(LINE) - 1), st.binary(max_size=8), st.integers(0, 8))
def test_a_damaged_event_is_one_or_refused(at: int, put: bytes, instead: int) -> None:
    with contextlib.suppress(BadEvent):
        event = parse_event(LINE[:at] + put + LINE[at + instead :])
        assert isinstance(event.what, Happening) and event.call >= 0


@pytest.mark.parametrize(
    "line",
    [
        b"",
        LINE.replace(b"reached", b"reach"),
        LINE.replace(b"hold", b"grab"),
        LINE.replace(b" ns=5312345678", b""),
        LINE.replace(b"call=4", b"call=-4"),
        LINE.replace(b"call=4", b"call=4 call=5"),
        LINE.replace(b"call=4", b"call=\xd9\xa4"),  # a digit of another script
        LINE.replace(b"call=4", b"call=" + b"9" * 5000),
        LINE.replace(b"slot=3", b"slot"),
    ],
)
def test_what_is_no_event(line: bytes) -> None:
    with pytest.raises(BadEvent, match="kfault said"):
        parse_event(line)


def test_the_module_has_the_same_words() -> None:
    source = (SOURCES / "kfault" / "proc.c").read_text()

    def words(array: str) -> list[str]:
        body = re.search(rf"\b{array}\[\] = {{(.*?)}};", source, re.DOTALL)
        assert body is not None
        return re.findall(r'"(\w+)"', body[1])

    assert words("happening_names") == [str(what) for what in Happening]
    assert words("action_names") == [str(action) for action in Action]


# -- commands -------------------------------------------------------------------------------------------------


def test_commands() -> None:
    assert arming(Action.HOLD, "f", argument=None, nth=1, times=1, pid=None) == "hold f nth=1 times=1"
    assert arming(Action.DELAY, "f", argument=5, nth=2, times=0, pid=7) == "delay f us=5 nth=2 times=0 pid=7"
    assert arming(Action.RETURN, "f", argument=-16, nth=1, times=1, pid=None) == "return f value=-16 nth=1 times=1"


@given(
    st.sampled_from(Action), st.one_of(names, st.text(max_size=80)), st.none() | st.integers(), st.integers(),
    st.integers(), st.none() | st.integers(),
)  # fmt: skip
def test_a_command_is_one_line_of_words_or_refused(
    action: Action, function: str, argument: int | None, nth: int, times: int, pid: int | None
) -> None:
    with contextlib.suppress(UsageError):
        command = arming(action, function, argument=argument, nth=nth, times=times, pid=pid)
        assert re.fullmatch(r"\w+ [\w.]+( \w+=-?\d+)+", command, re.ASCII)
        assert len(command) < 256


@pytest.mark.parametrize(
    ("function", "argument", "nth", "times", "pid"),
    [
        ("", 1, 1, 1, None),
        ("a b", 1, 1, 1, None),
        ("f\n", 1, 1, 1, None),
        ("1f", 1, 1, 1, None),
        ("f" * 64, 1, 1, 1, None),
        ("f", -1, 1, 1, None),
        ("f", 1 << 32, 1, 1, None),
        ("f", None, 1, 1, None),
        ("f", 1, 0, 1, None),
        ("f", 1, 1, -1, None),
        ("f", 1, 1 << 63, 1, None),
        ("f", 1, 1, 1, 0),
        ("f", 1, 1, 1, 1 << 31),
    ],
)
def test_what_nobody_can_arm(function: str, argument: int | None, nth: int, times: int, pid: int | None) -> None:
    with pytest.raises(UsageError):
        arming(Action.DELAY, function, argument=argument, nth=nth, times=times, pid=pid)


def test_copies_are_whole() -> None:
    kallsyms = """\
ffffffffc0001000 t sev_f.constprop.0\t[kvm_amd]
ffffffffc0001100 t sev_f.isra.0.constprop.1\t[kvm_amd]
ffffffffc0001200 t sev_f.cold\t[kvm_amd]
ffffffffc0001300 t sev_f.part.0\t[kvm_amd]
ffffffffc0001400 t sev_f.constprop.0.cold\t[kvm_amd]
ffffffffc0001500 t __pfx_sev_f.constprop.0\t[kvm_amd]
ffffffffc0001600 t sev_fun.constprop.0\t[kvm_amd]
ffffffffc0001700 t sev_f.constprop.0\t[other]
"""
    assert copies("sev_f", kallsyms) == ("sev_f.constprop.0", "sev_f.isra.0.constprop.1")
    assert copies("sev_fun.constprop", kallsyms) == copies("sev_", kallsyms) == ()
    assert copies("g", f"{kallsyms}ffffffffc0001800 T g\nffffffffc0001900 t g.isra.1\n") == ("g", "g.isra.1")


def test_a_function_that_newer_kernels_have_another_for_is_found_by_its_older_name() -> None:
    both = "ffffffffc0001000 T kvm_lock_all_vcpus\n"
    assert copies("sev_lock_vcpus_for_migration", both) == ("kvm_lock_all_vcpus",)
    both += "ffffffffc0001800 t sev_lock_vcpus_for_migration.constprop.0\n"
    assert copies("sev_lock_vcpus_for_migration", both) == ("sev_lock_vcpus_for_migration.constprop.0",)


# -- the client, against a module made of a socket -------------------------------------------------------------


class Module:
    """Answers commands as kfault.ko would: the answer is there when the write returns."""

    def __init__(self, events: socket.socket) -> None:
        self._events = events

    def tell(self, what: Happening, slot: int, *, function: str = "f", call: int = 0, ns: int = 1) -> None:
        self._events.send(line_of(Event(what, slot, Action.HOLD, function, 9, 9, call, ns, 0)))

    def obey(self, command: str) -> None:
        verb, what = command.split()[:2]
        if verb == "hold" and what == "only_a_variant":
            raise OSError(errno.ENOENT, "no such function")
        if verb == "hold":
            self.tell(Happening.ARMED, 0, function=what, ns=100)
        elif verb == "clear":
            self.tell(Happening.CLEARED, int(what), call=5)
        elif verb == "count":
            self.tell(Happening.COUNTED, int(what), call=3)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Kfault, Module]]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.setblocking(False)
    (tmp_path / "kallsyms").write_text("0 t only_a_variant.isra.0\n")
    with there, Kfault(OwnedFd(here.detach()), proc=tmp_path) as kfault:
        module = Module(there)
        monkeypatch.setattr(kfault, "_write", module.obey)
        yield kfault, module


def test_each_wait_takes_the_next_event(pair: tuple[Kfault, Module]) -> None:
    kfault, module = pair
    slot = kfault.hold("f", times=3)
    assert (slot.number, slot.function, slot.times) == (0, "f", 3)
    module.tell(Happening.REACHED, 0, call=1)
    module.tell(Happening.REACHED, 0, call=2)
    module.tell(Happening.RELEASED, 0, call=1)
    assert kfault.wait_reached(slot, within=1).call == 1
    released = kfault.wait(slot, Happening.RELEASED, within=1, call=1)
    assert released is not None
    assert kfault.wait_reached(slot, within=1).call == 2
    assert kfault.wait(slot, Happening.REACHED, within=0) is None
    assert [event.what for event in kfault.log] == ["armed", "reached", "reached", "released"]
    assert kfault.clear(slot) == 5
    with pytest.raises(InternalError, match="not armed"):
        kfault.release(slot)


def test_a_variant_is_found_by_the_name_in_the_source(pair: tuple[Kfault, Module]) -> None:
    assert pair[0].hold("only_a_variant").function == "only_a_variant.isra.0"


def test_a_slot_used_again_does_not_see_what_was_there_before(pair: tuple[Kfault, Module]) -> None:
    kfault, module = pair
    first = kfault.hold("f")
    module.tell(Happening.REACHED, 0, call=1, ns=50)
    kfault.clear(first)
    second = kfault.hold("f")
    assert kfault.wait(second, Happening.REACHED, within=0) is None


def test_what_was_not_reached_says_where_everybody_was(pair: tuple[Kfault, Module], tmp_path: Path) -> None:
    kfault, _ = pair
    task = tmp_path / "71" / "task" / "72"
    task.mkdir(parents=True)
    (tmp_path / "71" / "status").write_text("Name:\tx\nTgid:\t71\nPid:\t71\n")
    (task / "stat").write_text("72 (a b) D 1 2 3")
    (task / "wchan").write_text("sev_lock_two_vms")
    (task / "stack").write_text("[<0>] sev_lock_two_vms+0x1/0x2\n[<0>] kvm_vm_ioctl+0x3/0x4\n")
    slot = kfault.hold("f", nth=2)
    with pytest.raises(NotReached) as caught:
        kfault.wait_reached(slot, within=0.05, watch=[71, 73])
    told = str(caught.value)
    assert "hold of f (call 2)" in told and "not reached in 0.05 s (3 matching calls)" in told
    assert "71/72: state D" in told and "sleeping in sev_lock_two_vms" in told and "kvm_vm_ioctl" in told
    assert "73/73 has ended" in told
    assert caught.value.exit_code is ExitCode.UNKNOWN  # a hold that was not there proves nothing either way


def test_a_thread_is_looked_at_alone(tmp_path: Path) -> None:
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "status").write_text("Tgid:\t4\n")
    assert [(there.pid, there.tid) for there in whereabouts(5, tmp_path)] == [(5, 5)]


def test_a_kernel_without_the_module(tmp_path: Path) -> None:
    with pytest.raises(HostLacks, match="not loaded") as caught:
        Kfault.open(tmp_path / "kfault")
    assert "insmod" in caught.value.remedy


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EPERM, "list"), (errno.ENOSPC, "slots"), (errno.ENOENT, "no such function")]
)
def test_refusals_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str) -> None:
    (tmp_path / "kallsyms").write_text("0 t other\n")
    kfault = Kfault(OwnedFd(os.open("/dev/null", os.O_RDWR)), proc=tmp_path)

    def refuse(command: str) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(kfault, "_write", refuse)
    with pytest.raises(Refused, match=said) as caught:
        kfault.hold("f")
    assert caught.value.errno == number
    kfault.close()


# -- the documents --------------------------------------------------------------------------------------------


def test_the_manual_has_the_module_s_list() -> None:
    listed = re.findall(r'{ "(\w+)", ([A-Z| ]+) }', (SOURCES / "kfault" / "known.h").read_text())
    assert len(listed) > 30
    assert {name: [flag in may for flag in ("SLEEP", "FAIL", "SKIP")] for name, may in listed} == {
        name: row[:3] for name, row in manual_table().items()
    }
