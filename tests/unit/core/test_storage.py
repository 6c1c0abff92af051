# SPDX-License-Identifier: Apache-2.0
"""P7 and the file that the host keeps the firmware's state in: what excuses an INIT, and what does not."""

from __future__ import annotations

from errno import EINVAL, EIO, ENOENT, ENOSPC

import msgspec
import pytest

from chaos.history.records import Firmware, History
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import Builder, shipped

SIGNATURE = "init-after-unwritten-state:EIO-of-the-firmware-(status-1)-for-ok"
HONEST = ("PLATFORM_STATUS", "DF_FLUSH")


class Run(Builder):
    """INITs of one VM each, and which commands they had the firmware be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[int, str]] = []
        self.spawn("host", "source")
        self.look("before")

    def look(self, label: str) -> None:
        seen = self.observe(label)
        misc = {cgroup: files | {"max": {}} for cgroup, files in seen.misc.items()}
        self.records[seen.seq] = msgspec.structs.replace(seen, misc=misc)

    def storage(self, state: str, *, error: int = 0) -> None:
        self.do("storage", "", error=error, state=state)

    def init(self, vm: str, *, error: int = 0, firmware: int = 0, sends: str = "INIT_EX", killed: bool = False) -> None:
        self.do("create", "host", vm=vm, kind="sev", vcpus=0, memory="guest")
        invoke = self.invoke("init", "host", vm=vm, key="sev")
        self.sent.append((self.tick(), sends))
        self.done(invoke, "info" if killed else "fail" if error else "ok", error=error, firmware=firmware)

    def over(self) -> History:
        for order, (t, command) in enumerate(self.sent):
            self.add(Firmware(t=t, order=order, command=command, status=0, began=t))
        self.look("after")
        return self.end()

    def judged(self) -> Verdict:
        return CHECKERS["P7"](shipped("storage-missing"), self.over())


def unwritten() -> Run:
    """A second INIT after one whose state could not be written, when it can be again."""
    run = Run()
    run.storage("missing")
    run.init("first", error=ENOENT)
    run.storage("well")
    run.init("second", error=EIO, firmware=1)
    return run


@pytest.mark.parametrize(("sends", "known"), [("INIT_EX", True), ("DF_FLUSH", False)])
def test_a_writer_that_was_killed_is_one_that_could_not_write(sends: str, known: bool) -> None:
    """Only if it was he who had the platform initialised."""
    run = Run()
    run.init("first", sends=sends, killed=True)
    run.exited("host", -9)
    run.spawn("host", "source")
    run.init("second", error=EIO, firmware=1)
    assert run.judged().signature == (SIGNATURE if known else SIGNATURE.replace("-after-unwritten-state", ""))


@pytest.mark.parametrize(
    ("state", "error", "outcome"),
    [
        ("missing", ENOENT, Outcome.UNKNOWN),  # left open: nothing was refused as the contract says
        ("full", ENOSPC, Outcome.UNKNOWN),
        ("full", EIO, Outcome.UNKNOWN),
        ("missing", ENOSPC, Outcome.BROKEN),
        ("read-only", EIO, Outcome.BROKEN),
        ("well", ENOENT, Outcome.BROKEN),
    ],
)
def test_an_init_may_say_what_is_wrong_with_the_file(state: str, error: int, outcome: Outcome) -> None:
    run = Run()
    run.storage(state)
    run.init("first", error=error)
    assert run.judged().outcome is outcome


def test_the_next_one_must_succeed_and_what_it_says_instead_is_a_finding() -> None:
    assert unwritten().judged().signature == SIGNATURE


def test_one_that_succeeded_in_between_ends_what_the_finding_explains() -> None:
    run = Run()
    run.storage("missing")
    run.init("first", error=ENOENT)
    run.storage("well")
    run.init("second")
    run.init("third", error=EIO, firmware=1)
    assert run.judged().signature == SIGNATURE.replace("init-after-unwritten-state", "init")


@pytest.mark.parametrize("sends", HONEST)
def test_where_the_platform_was_up_already_nobody_wrote_the_file(sends: str) -> None:
    run = Run()
    run.storage("missing")
    run.init("first", error=ENOENT, sends=sends)
    assert run.judged().outcome is Outcome.BROKEN


def test_what_could_not_be_spoiled_explains_nothing() -> None:
    run = Run()
    run.storage("missing", error=EIO)
    run.init("first", error=ENOENT)
    assert run.judged().outcome is Outcome.BROKEN


def test_what_could_not_be_mended_still_explains() -> None:
    run = Run()
    run.storage("missing")
    run.storage("well", error=EIO)
    run.init("first", error=ENOENT)
    assert run.judged().outcome is Outcome.UNKNOWN


def test_with_a_refusal_that_the_contract_has_the_promise_is_kept() -> None:
    run = Run()
    run.storage("missing")
    run.init("first", error=ENOENT)
    run.storage("well")
    run.init("second")
    run.do("init", "host", vm="second", key="sev", error=EINVAL)
    assert run.judged().outcome is Outcome.KEPT
