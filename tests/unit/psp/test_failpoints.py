# SPDX-License-Identifier: Apache-2.0
"""The grammar of failpoints: what it reads, what it refuses, and that what it writes is what it reads."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.lab.psp import failpoints
from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.plan import (
    Corrupt,
    DelayAnswer,
    Die,
    Fail,
    FailpointAction,
    FailpointRule,
    Reset,
    Stall,
    TellLength,
    named_status,
)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("LAUNCH_START#2=fail:RESOURCE_LIMIT", FailpointRule(Fail("RESOURCE_LIMIT"), command="LAUNCH_START", nth=2)),
        ("DEACTIVATE*3=delay:50ms", FailpointRule(DelayAnswer(50_000_000), command="DEACTIVATE", times=3)),
        ("GUEST_STATUS=stall", FailpointRule(Stall(), command="GUEST_STATUS")),
        ("*%10=fail:HWERROR_PLATFORM", FailpointRule(Fail("HWERROR_PLATFORM"), percent=10.0)),
        ("**2=skip", FailpointRule(Fail("SUCCESS"), times=2)),
        ("*=withhold", FailpointRule(Stall(carried_out=True))),
        ("INIT/3#6=lie:19", FailpointRule(Fail("HWERROR_PLATFORM", carried_out=True), command="INIT", nth=6, every=3)),
        ("NOP%0.5=garbage", FailpointRule(Corrupt(), command="NOP", percent=0.5)),
        ("DF_FLUSH=fail:4711", FailpointRule(Fail("4711"), command="DF_FLUSH")),
        ("DECOMMISSION=dead", FailpointRule(Die(), command="DECOMMISSION")),
        ("PEK_CSR#1=length:4000", FailpointRule(TellLength(4000), command="PEK_CSR", nth=1)),
        (" ACTIVATE#1=reset ", FailpointRule(Reset(), command="ACTIVATE", nth=1)),
    ],
)
def test_what_is_read(text: str, rule: FailpointRule) -> None:
    assert failpoints.parse(text) == (rule,)


def test_a_plan_is_several() -> None:
    rules = failpoints.parse("INIT=dead; NOP#2=delay:1s;*=skip")
    assert [rule.command for rule in rules] == ["INIT", "NOP", None]
    assert failpoints.write(rules) == "INIT=dead; NOP#2=delay:1s; *=skip"
    assert {rule.name for rule in failpoints.named(rules, "mine")} == {"mine"}


@pytest.mark.parametrize(
    ("text", "wrong", "allowed"),
    [
        ("", "'' is no failpoint", "COMMAND=ACTION"),
        ("INIT", "'INIT' is no failpoint", "COMMAND=ACTION"),
        ("INIT=dead;", "'' is no failpoint", "COMMAND=ACTION"),
        ("INTI=dead", "there is no command 'INTI'", "give one of INIT, SHUTDOWN"),
        ("init=dead", "there is no command 'init'", "or * for any"),
        ("=dead", "there is no command ''", "or * for any"),
        ("INIT#0=dead", "nth must be at least 1, got 0", ""),
        ("INIT#1.5=dead", "#1.5 is no whole number", ""),
        ("INIT#1#2=dead", "# is given twice", ""),
        ("INIT%101=dead", "percent must be 0 to 100", ""),
        ("INIT@2=dead", "'@2' does not say when", "#NTH, /EVERY, %PERCENT or *TIMES"),
        ("INIT #2=dead", "' #2' does not say when", "#NTH"),
        ("INIT=explode", "there is no action 'explode'", "fail:STATUS, lie:STATUS, delay:TIME, length:BYTES, skip"),
        ("INIT=fail", "there is no action 'fail'", "fail:STATUS"),
        ("INIT=stall:1", "there is no action 'stall:1'", "stall"),
        ("INIT=fail:NOPE", "status 'NOPE' is no number up to 65535 and none of SUCCESS, INVALID_PLATFORM_STATE", ""),
        ("INIT=fail:65536", "status '65536' is no number up to 65535", ""),
        ("INIT=fail:SUCCESS", "SUCCESS is no failure", "`skip`"),
        ("INIT=lie:0", "SUCCESS is no failure", "`skip`"),
        ("INIT=delay:50", "'50' is no time", "ns, us, ms, s, as in 50ms"),
        ("INIT=delay:601s", "601s is too long", "at most 600s"),
        ("INIT=delay:-1s", "'-1s' is no time", "a number and a unit"),
        ("GET_ID=length:-1", "'-1' is no length", "a number of bytes, as in 4000"),
        ("GET_ID=length:4294967296", "a length is 0 to 4294967295, not 4294967296", ""),
        ("INIT=dead;" * 1000, "a plan is at most 4096 characters long, this has 10000", ""),
    ],
)
def test_what_is_refused(text: str, wrong: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wrong)) as refused:
        failpoints.parse(text)
    assert allowed in str(refused.value)


CODES = st.integers(1, 0xFFFF) | st.sampled_from([int(status) for status in FirmwareStatus if status])
ACTIONS: st.SearchStrategy[FailpointAction] = st.one_of(
    st.builds(Fail, CODES.map(named_status), st.booleans()),
    st.builds(DelayAnswer, st.integers(0, failpoints.LATEST_NS)),
    st.builds(Stall, st.booleans()),
    st.builds(TellLength, st.integers(0, 0xFFFFFFFF)),
    st.sampled_from([Fail("SUCCESS"), Corrupt(), Die(), Reset()]),
)
COUNTS = st.none() | st.integers(1, 999_999_999)
RULES = st.builds(
    FailpointRule,
    ACTIONS,
    command=st.none() | st.sampled_from([command.name for command in FirmwareCommand]),
    nth=COUNTS,
    every=COUNTS,
    percent=st.none() | st.integers(0, 10_000_000).map(lambda n: n / 100_000),
    times=COUNTS,
)


@given(st.lists(RULES, min_size=1, max_size=5).map(tuple))
def test_what_is_written_is_read(rules: tuple[FailpointRule, ...]) -> None:
    text = failpoints.write(rules)
    assert failpoints.parse(text) == rules
    assert failpoints.write(failpoints.parse(text)) == text


@given(st.text())
@settings(max_examples=300)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        rules = failpoints.parse(text)
    except ValueError:
        return
    assert failpoints.parse(failpoints.write(rules)) == rules


def test_a_million_random_bytes() -> None:
    """Some of them from the grammar's own letters, else nothing but its first check is tried."""
    chance = random.Random(7)
    words = ["INIT", "*", "#", "%", "/", "=", ";", ":", "fail", "delay", "stall", "1", "0.5", "ms", "ACTIVE", "9" * 20]
    read = left = 0
    for number in range(1_000_000 // 40):
        data = chance.randbytes(40).decode("latin-1")
        if number % 2:
            data = "".join(chance.choice(words) for _ in range(chance.randrange(1, 12)))
        try:
            failpoints.parse(data)
            read += 1
        except ValueError:
            left += 1
    assert left > read > 0


def test_the_page_names_every_command_status_and_action() -> None:
    page = (Path(__file__).parents[3] / "docs" / "firmware.md").read_text()
    told = set(re.findall(r"`([A-Z_0-9]+)`", page))
    assert not {command.name for command in FirmwareCommand} - told
    rows = {(int(number), name) for number, name in re.findall(r"^\| (\d+) \| `([A-Z_]+)` \|$", page, re.MULTILINE)}
    assert rows == {(int(status), status.name) for status in FirmwareStatus}
    numbers = {name: int(n, 16) for name, n in re.findall(r"^\| `([A-Z_]+)` \| (0x[0-9a-f]+) \|", page, re.MULTILINE)}
    assert numbers and all(FirmwareCommand[name] == number for name, number in numbers.items())
    with pytest.raises(ValueError, match="give one of") as refused:
        failpoints.parse("NOP=?")
    actions = str(refused.value).rpartition("give one of ")[2].split(", ")
    assert all(f"| `{action}` |" in page for action in actions)
