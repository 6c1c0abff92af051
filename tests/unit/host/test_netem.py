# SPDX-License-Identifier: Apache-2.0
"""What netem is told and what it tells: values, and messages as bytes."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.errors import HostLacks, UsageError
from chaos.netns import netem, netlink, qdisc
from chaos.netns.netem import Impairment, Reading, took_effect

percentages = st.floats(1e-6, 100) | st.just(0.0)
impairments = st.builds(
    Impairment,
    delay_us=st.integers(1, 3_600_000_000),
    jitter_us=st.integers(0, 2_000_000),
    loss=percentages,
    duplication=percentages,
    reordering=percentages,
    corruption=percentages,
    rate=st.integers(1, (1 << 32) - 1).map(lambda octets: 8 * octets) | st.just(0),
    limit=st.integers(1, 1_000_000),
    seed=st.integers(0, (1 << 64) - 1) | st.none(),
)
NOTHING = qdisc.Counters(bytes=0, packets=0, qlen=0, drops=0, requeues=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("delay_us", -1),
        ("delay_us", 1.5),
        ("delay_us", True),
        ("jitter_us", 2_000_001),
        ("loss", 100.1),
        ("loss", -1),
        ("loss", math.nan),
        ("loss", "1"),
        ("corruption", 1e-7),
        ("rate", 7),
        ("limit", 0),
        ("seed", 1 << 64),
    ],
)
def test_what_makes_no_sense_is_refused(key: str, value: object) -> None:
    arguments: dict[str, Any] = {key: value}
    with pytest.raises(UsageError, match=f"{key}: "):
        Impairment(**arguments)


def test_reordering_needs_a_delay() -> None:
    with pytest.raises(UsageError, match="without a delay"):
        Impairment(reordering=5)
    assert Impairment(reordering=5, delay_us=1).effects == ("delay_us", "reordering")


def test_the_default_does_nothing() -> None:
    assert Impairment().effects == ()


@settings(deadline=None)  # the first example imports pyroute2
@given(impairments)
def test_the_kernels_units_and_back(asked: Impairment) -> None:
    told = netem._reading(netem._options(asked), NOTHING).impairment
    for name in netem.PERCENTAGES:
        assert getattr(told, name) == pytest.approx(getattr(asked, name), rel=0, abs=1e-6)
    exact = ("delay_us", "jitter_us", "rate", "limit", "seed")
    assert [getattr(told, name) for name in exact] == [getattr(asked, name) for name in exact]
    assert told.effects == asked.effects  # nothing that was asked for is rounded away


@settings(deadline=None)  # the first example imports pyroute2
@given(impairments)
def test_every_message_says_everything(asked: Impairment) -> None:
    """The kernel leaves as it was what a change has no attribute for."""
    message = qdisc._message()()
    message.update(index=1, handle=qdisc.HANDLE, parent=qdisc.ROOT)
    options = netem._options(asked)
    message["attrs"] = [("TCA_KIND", "netem"), ("TCA_OPTIONS", qdisc._attributes(options))]
    message.encode()
    found = dict(attributes(bytes(message.data)[16 + 20 :]))
    assert found[1] == b"netem\0"
    head, rest = found[2][:24], dict(attributes(found[2][24:]))
    assert struct.unpack("=6I", head) == (
        0,
        asked.limit,
        options.loss,
        1 if options.reorder else 0,
        options.duplicate,
        0,
    )
    seed = {14: struct.pack("=Q", asked.seed)} if asked.seed is not None else {}
    assert rest == {
        1: bytes(12),
        3: struct.pack("=II", options.reorder, 0),
        4: struct.pack("=II", options.corrupt, 0),
        6: struct.pack("=IiIi", options.rate, 0, 0, 0),
        10: struct.pack("=q", asked.delay_us * 1000),
        11: struct.pack("=q", asked.jitter_us * 1000),
        **seed,
    }


@settings(deadline=None)  # the first example imports pyroute2
@given(impairments)
def test_what_was_written_is_read(asked: Impairment) -> None:
    written = qdisc._message()()
    options = netem._options(asked)
    written["attrs"] = [("TCA_KIND", "netem"), ("TCA_OPTIONS", qdisc._attributes(options))]
    written.encode()
    read = qdisc._message()(data=bytes(written.data))
    read.decode()
    assert qdisc._options(read.get_attr("TCA_OPTIONS")) == options


def test_options_of_other_qdiscs_are_left_alone() -> None:
    kind = struct.pack("=HH", 4 + 9, 1) + b"fq_codel\0\0\0\0"
    odd = struct.pack("=HH", 4 + 3, 2) + b"abc\0"
    data = struct.pack("=IHHII", 16 + 20 + len(kind + odd), 36, 0, 0, 0) + bytes(20) + kind + odd
    message = qdisc._message()(data=data)
    message.decode()
    assert message.get_attr("TCA_KIND") == "fq_codel"


def attributes(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while data:
        length, kind = struct.unpack_from("=HH", data)
        found.append((kind & 0x3FFF, data[4:length]))
        data = data[(length + 3) & ~3 :]
    return found


# -- what counts as applied -----------------------------------------------------------------------------------


class Kernel:
    """Stands for the messages: keeps what it was given, as its netem would have it."""

    def __init__(self, **overrides: Any) -> None:
        self.overrides = overrides
        self.options: qdisc.Options | None = None

    def take(self, options: qdisc.Options) -> None:
        self.options = qdisc.Options(
            **{name: getattr(options, name) for name in qdisc.Options.__slots__} | self.overrides
        )


@pytest.mark.parametrize(
    ("seed", "overrides", "well"),
    [
        (None, {"seed": 99}, True),  # it has chosen one
        (None, {"seed": None}, True),  # it has none
        (7, {}, True),
        (7, {"seed": None}, True),  # an older one, which goes without
        (7, {"seed": 8}, False),
        (None, {"delay": 0}, False),  # one that knows no nanoseconds
        (None, {"corrupt": 5}, False),
    ],
)
def test_what_was_asked_for_is_read_back(
    seed: int | None, overrides: dict[str, Any], well: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(**overrides)
    kernel.take(netem._options(Impairment(delay_us=5, seed=seed)))
    monkeypatch.setattr(qdisc, "find", lambda *_: kernel.options and (kernel.options, NOTHING))
    monkeypatch.setattr(qdisc, "delete", lambda *_: setattr(kernel, "options", None))
    asked = netem._options(Impairment(delay_us=5, seed=seed))
    if well:
        assert netem._checked(None, 1, asked).impairment.delay_us == 5
    else:
        with pytest.raises(HostLacks, match=r"was given .* and took"):
            netem._checked(None, 1, asked)
        assert kernel.options is None  # taken off again


def reading(impairment: Impairment, **counters: int) -> Reading:
    return Reading(impairment, **(dict.fromkeys(Reading.__slots__[1:], 0) | counters))


@pytest.mark.parametrize(
    ("impairment", "counters", "expected"),
    [
        (Impairment(), {"passed": 5}, {}),
        (Impairment(loss=1), {"passed": 5}, {"loss": False}),
        (Impairment(loss=1), {"dropped": 1}, {"loss": True}),
        (Impairment(delay_us=1), {}, {"delay_us": False}),
        (Impairment(delay_us=1), {"waiting": 1}, {"delay_us": True}),
        (Impairment(rate=8, jitter_us=1), {"passed": 1}, {"jitter_us": True, "rate": True}),
        (Impairment(duplication=1, corruption=1), {"passed": 5}, {"duplication": None, "corruption": None}),
        (
            Impairment(delay_us=1, reordering=1),
            {"reordered": 1, "passed": 1},
            {"delay_us": True, "reordering": True},
        ),
    ],
)
def test_what_counts_as_evidence(
    impairment: Impairment, counters: dict[str, int], expected: dict[str, bool | None]
) -> None:
    assert took_effect(reading(impairment), reading(impairment, **counters)) == expected


# -- the kernel's news ----------------------------------------------------------------------------------------


def test_the_end_of_a_namespace_in_the_news() -> None:
    pad = struct.pack("=HHI", 8, 7, 0)
    gone = bytes(4) + pad + struct.pack("=HHi", 8, netlink.NETNSA_NSID, 12)
    assert netlink.departed(netlink.RTM_DELNSID, gone) == 12
    assert netlink.departed(netlink.RTM_DELNSID - 1, gone) is None
    assert netlink.departed(netlink.RTM_DELNSID, bytes(4) + pad) is None
    message = struct.pack("=IHHII", 16 + len(gone), netlink.RTM_DELNSID, 0, 0, 0) + gone
    assert list(netlink._split(message * 2)) == [(netlink.RTM_DELNSID, gone)] * 2


@given(st.binary(max_size=200), st.integers(0, 100))
def test_no_news_can_break_us(data: bytes, kind: int) -> None:
    netlink.departed(kind, data)
    netlink.departed(netlink.RTM_DELNSID, data)
    assert sum(len(payload) for _, payload in netlink._split(data)) <= len(data)
