# SPDX-License-Identifier: Apache-2.0
"""P14: what was written behind what a caller told, and what the firmware was asked to write."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from chaos.history.records import Firmware, Header, History, Note, Record, Value
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, changed
from tests.unit.core.doctored import DEVIATED, HELD, SKIPPED, UNKNOWN, verdict_of, without

PAGE = 4096
MINE, GUESTS, ITS_OWN = [0x10000, 0x11000], [0x40000, 0x7000], 0x200000


class Bounds(Builder):
    """A guest, commands to /dev/sev, and commands to debug the guest with what the firmware was sent for them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[int, str, dict[str, int]]] = []
        self.spawn("host", "source")
        self.launch("guest", "host", "sev")

    def platform(
        self, command: str, behind: Value, *, outcome: Literal["ok", "fail", "info"] = "fail", **lengths: int
    ) -> None:
        args: dict[str, Value] = {"command": command, **lengths}
        invoke = self.invoke("platform", "host", step=-1, **args)
        value: dict[str, Value] = {} if outcome == "info" else {"length": 2084, "behind": behind}
        error = 5 if outcome == "fail" else 0
        self.done(invoke, outcome, error=error, firmware=4 if error else 0, value=value)

    def debug(
        self, f: str, *sent: tuple[str, int, int, int], outside: int = 0, pages: bool = True, length: int = PAGE
    ) -> None:
        """With the commands it was, each with its source, destination and length."""
        invoke = self.invoke(f, "host", vm="guest", read_at=7, write_at=9, length=length)
        for command, source, destination, size in sent:
            self.sent.append((self.tick(), command, {"source": source, "destination": destination, "length": size}))
        frames: tuple[list[int | str], ...] = tuple([*each] if pages else [] for each in (GUESTS, MINE))
        self.done(invoke, value={"outside": outside, "read_pages": frames[0], "written_pages": frames[1]})

    def over(self, *, more: bool = True) -> History:
        """With what is sent to give the guest up, unless there is to be no `more`."""
        start = next(r.t for r in self.records if getattr(r, "f", "") == "launch_start")
        last: list[tuple[int, str, dict[str, int]]] = [(self.tick(), "DEACTIVATE", {})] if more else []
        for order, (t, command, asked) in enumerate([(start, "LAUNCH_START", {}), *self.sent, *last]):
            self.add(Firmware(t=t, order=order, command=command, status=0, handle=1, asked=asked))
        return self.end()


def kept() -> Bounds:
    """Everything within bounds; one command goes over two pages that follow each other for its caller as well."""
    b = Bounds()
    b.platform("PEK_CSR", 0, length=16)
    b.platform("PDH_CERT_EXPORT", 0, outcome="ok", length=2084, chain=6252)
    b.do("platform", "host", command="PEK_GEN")  # which has no buffer
    b.debug("dbg_decrypt", ("DBG_DECRYPT", GUESTS[0], MINE[0], PAGE))
    b.debug("dbg_decrypt", ("DBG_DECRYPT", GUESTS[0], MINE[0] + 16, PAGE))
    b.debug("dbg_encrypt", ("DBG_DECRYPT", GUESTS[0], ITS_OWN, PAGE), ("DBG_ENCRYPT", ITS_OWN, GUESTS[0], PAGE))
    return b


def within_bounds() -> History:
    return kept().over()


def written_behind() -> History:
    b = kept()
    b.platform("GET_ID2", 48, length=16)
    return b.over()


def all_behind() -> History:
    """Finding 0010."""
    b = kept()
    for command in ("PEK_CSR", "PDH_CERT_EXPORT", "GET_ID2"):
        b.platform(command, 1916, length=2084)
    return b.over()


def written_beyond() -> History:
    b = kept()
    b.debug("dbg_encrypt", ("DBG_DECRYPT", GUESTS[0], ITS_OWN, PAGE + 16))
    return b.over()


def test_within_bounds() -> None:
    verdict = verdict_of("P14", within_bounds())
    assert verdict.outcome is HELD
    assert "4 commands to debug a guest stayed within their pages" in verdict.reason


@pytest.mark.parametrize("outcome", ["ok", "fail"])
def test_bytes_behind_what_was_told_are_nobodys_to_write(outcome: Literal["ok", "fail"]) -> None:
    b = kept()
    b.platform("GET_ID2", 48, outcome=outcome, length=16)
    verdict = verdict_of("P14", b.over())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "written-behind:GET_ID2")
    assert "GET_ID2 with a buffer of 16 bytes was told no more, and 48 bytes behind that were written" in verdict.reason


def test_what_nobody_could_look_behind_is_unknown() -> None:
    b = kept()
    b.platform("GET_ID2", None, length=1 << 31)
    assert verdict_of("P14", b.over()).outcome is UNKNOWN


def test_who_does_not_live_to_look_is_no_witness() -> None:
    b = kept()
    b.platform("PEK_CSR", 0, outcome="info", length=16)
    verdict = verdict_of("P14", b.over())
    assert verdict.outcome is UNKNOWN
    assert "did not live to look at its buffer" in verdict.reason


def test_bytes_around_what_was_debugged_are_nobodys_either() -> None:
    b = kept()
    b.debug("dbg_encrypt", ("DBG_ENCRYPT", MINE[0], GUESTS[0], PAGE), outside=16)
    verdict = verdict_of("P14", b.over())
    assert verdict.signature == "written-outside:dbg_encrypt"
    assert f"dbg_encrypt of {PAGE} bytes from 0x7 to 0x9 was told no more, and 16 bytes outside" in verdict.reason


def test_both_buffers_of_a_command_are_named() -> None:
    b = kept()
    b.platform("PDH_CERT_EXPORT", 8, length=2084, chain=6252)
    told = "PDH_CERT_EXPORT with a buffer of 2084 and one of 6252 bytes was told no more"
    assert told in verdict_of("P14", b.over()).reason


@pytest.mark.parametrize(
    ("source", "destination", "length", "signature"),
    [
        (GUESTS[0], ITS_OWN, PAGE + 16, "beyond-page"),
        (GUESTS[0], GUESTS[0] + 16, PAGE, "beyond-page"),
        (GUESTS[0] + PAGE - 16, ITS_OWN, 32, "beyond-page"),
        (ITS_OWN + 4080, MINE[1], 16, ""),
        (MINE[0], ITS_OWN, 2 * PAGE, "beyond-page"),
        (MINE[1], ITS_OWN, PAGE + 1, "beyond-page"),
    ],
)
def test_a_command_ends_with_its_page_unless_the_caller_named_the_next(
    source: int, destination: int, length: int, signature: str
) -> None:
    b = kept()
    b.debug("dbg_encrypt", ("DBG_DECRYPT", source, destination, length))
    assert verdict_of("P14", b.over()).signature == signature


def without_chain(address: int = 0x778000000010, length: int = 0) -> History:
    """Finding 0013, with the address and the length that the firmware was given for the chain."""
    b = kept()
    b.platform("PDH_CERT_EXPORT", 0, length=2084, chain=length)
    first = {"first_address": 0x4000, "first_length": 2084}
    b.sent.append((b.tick(), "PDH_CERT_EXPORT", {**first, "second_address": address, "second_length": length}))
    return b.over()


@pytest.mark.parametrize(("address", "length", "outcome"), [(16, 0, DEVIATED), (0, 0, HELD), (0x5000, 16, HELD)])
def test_a_buffer_of_no_length_has_no_address(address: int, length: int, outcome: Outcome) -> None:
    verdict = verdict_of("P14", without_chain(address, length))
    assert verdict.outcome is outcome
    assert verdict.signature == ("address-of-nothing:PDH_CERT_EXPORT" if outcome is DEVIATED else "")


def test_where_the_pages_are_not_known_one_that_goes_on_tells_nothing() -> None:
    b = kept()
    b.debug("dbg_encrypt", ("DBG_DECRYPT", GUESTS[0], ITS_OWN, PAGE + 16), pages=False)
    assert verdict_of("P14", b.over()).outcome is UNKNOWN


def test_every_command_has_to_be_on_record() -> None:
    b = kept()
    b.debug("dbg_decrypt")  # succeeded, with nothing sent
    b.debug("dbg_decrypt")
    assert "not every command to debug a guest is on record" in verdict_of("P14", b.over()).reason

    def blank(record: Record) -> Record:
        return msgspec.structs.replace(record, asked={}) if isinstance(record, Firmware) else record

    assert verdict_of("P14", changed(kept().over(), blank)).outcome is UNKNOWN
    assert verdict_of("P14", kept().over(more=False)).outcome is UNKNOWN, "nothing shows that the last one is there"
    b = kept()
    b.add(Note(t=b.tick(), topic="witness", text="the firmware: 3 commands were not recorded", witness="firmware"))
    assert verdict_of("P14", b.over()).outcome is UNKNOWN


def test_one_that_was_refused_before_anything_was_sent_shows_nothing() -> None:
    b = Bounds()
    b.do("dbg_decrypt", "host", error=22, vm="guest", read_at=0, write_at=0, length=0)
    b.records[-1] = msgspec.structs.replace(b.records[-1], value={"outside": 0})
    verdict = verdict_of("P14", b.over())
    assert verdict.outcome is UNKNOWN and "no command to debug a guest was sent" in verdict.reason


def test_on_a_real_host_nobody_sees_the_commands() -> None:
    def local(record: Record) -> Record:
        return msgspec.structs.replace(record, host="local") if isinstance(record, Header) else record

    unwatched = changed(changed(kept().over(), without(Firmware)), local)
    assert verdict_of("P14", unwatched).outcome is SKIPPED
    assert verdict_of("P14", changed(kept().over(), without(Firmware))).outcome is UNKNOWN


def test_who_asked_nothing_of_the_kind_has_shown_nothing() -> None:
    assert verdict_of("P14", Bounds().over()).outcome is UNKNOWN


RELOADED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "in order": (("INIT_EX",), ("SHUTDOWN", "INIT_EX")),
    "down before": (("INIT", "SHUTDOWN"), ()),
    "by the next driver": (("INIT",), ("INIT",)),
    "once too few": (("INIT", "SHUTDOWN", "INIT_EX"), ()),
    "since before the run": ((), ("SHUTDOWN",)),
    "nobody saw": ((), ()),
}


def reloaded(before: tuple[str, ...], meanwhile: tuple[str, ...], *, outcome: Literal["ok", "fail"] = "ok") -> History:
    """The drivers were loaded anew, and the firmware was sent these."""
    b = Builder()
    sent = [(b.tick(), "PLATFORM_STATUS")] + [(b.tick(), command) for command in before]
    invoke = b.invoke("reload", "")
    sent += [(b.tick(), command) for command in meanwhile]
    b.done(invoke, outcome, error=16 if outcome == "fail" else 0)
    for order, (t, command) in enumerate(sent):
        b.add(Firmware(t=t, order=order, command=command, status=0))
    return b.end()


@pytest.mark.parametrize(
    ("how", "outcome", "signature"),
    [
        ("in order", HELD, ""),
        ("down before", HELD, ""),
        ("by the next driver", DEVIATED, "lent-memory-of-no-driver:INIT"),
        ("once too few", DEVIATED, "lent-memory-of-no-driver:INIT_EX"),
        ("since before the run", HELD, ""),
        ("nobody saw", UNKNOWN, ""),
    ],
)
def test_the_firmware_gives_back_what_it_was_lent_before_the_driver_goes(
    how: str, outcome: Outcome, signature: str
) -> None:
    verdict = verdict_of("P14", reloaded(*RELOADED[how]))
    assert (verdict.outcome, verdict.signature) == (outcome, signature)


def test_of_a_driver_that_may_be_there_or_of_commands_that_are_lost_nothing_is_said() -> None:
    told = reloaded(*RELOADED["in order"])
    assert verdict_of("P14", reloaded(*RELOADED["in order"], outcome="fail")).outcome is UNKNOWN
    assert verdict_of("P14", changed(told, without(Firmware, command="SHUTDOWN"))).outcome is UNKNOWN
