# SPDX-License-Identifier: Apache-2.0
"""P1: misc.peak, what nobody saw between two observations."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest

from chaos.history.records import History, Observation, Record
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, changed, moved, moved_es
from tests.unit.core.doctored import DEVIATED, HELD, begun, verdict_of

Peaks = Mapping[str, Mapping[str, int]]


def peaked(history: History, peaks: Peaks, *, key: str = "sev") -> History:
    """misc.peak, by the label of the observation from which on it is so high, and the cgroup."""
    highest: dict[str, int] = {}

    def change(record: Record) -> Record:
        if not isinstance(record, Observation):
            return record
        highest.update(peaks.get(record.label, {}))
        misc = {
            cgroup: {**files, "peak": {k: highest.get(cgroup, 0) if k == key else 0 for k in ("sev", "sev_es")}}
            for cgroup, files in record.misc.items()
        }
        return msgspec.structs.replace(record, misc=misc)

    return changed(history, change)


FILLED = {".": 8}  # from below it the host was filled, before anything was observed


@pytest.mark.parametrize(
    ("peaks", "signature"),
    [
        ({"start": FILLED, "before": {"source": 1}, "after": {"destination": 1}}, ""),
        ({"start": FILLED, "before": {"source": 1}, "after": {"destination": 2}}, "peak-too-high-after-move:sev"),
        ({"start": FILLED, "before": {"source": 2}}, "peak-too-high-before-move:sev"),
        ({"start": FILLED, "before": {"source": 1, "destination": 1}}, "peak-too-high-before-move:sev"),
        ({"before": {"source": 1, ".": 1}, "after": {"destination": 1, ".": 2}}, ""),  # charged there before not here
        ({"before": {"source": 1, ".": 1}, "after": {"destination": 1, ".": 3}}, "peak-too-high-after-move:sev"),
    ],
)
def test_a_counter_was_never_higher_than_it_had_to_be(peaks: Peaks, signature: str) -> None:
    verdict = verdict_of("P1", peaked(moved(), peaks))
    assert (verdict.outcome, verdict.signature) == (DEVIATED if signature else HELD, signature)
    assert signature or verdict.reason.endswith("no counter was ever higher (misc.peak)")
    assert not signature or f"(up to observation {list(peaks)[-1]!r})" in verdict.reason
    assert not signature or ": misc.peak sev = " in verdict.reason


def test_a_key_that_a_host_has_no_asids_of_is_not_listed_and_was_never_charged() -> None:
    """Not in a cgroup that is made later either."""

    def change(record: Record) -> Record:
        for files in record.misc.values() if isinstance(record, Observation) else ():
            del files["peak"]["sev_es"]
        if isinstance(record, Observation) and record.label == "start":
            del record.misc["destination"]
        return record

    history = peaked(moved(), {"start": FILLED, "before": {"source": 1}, "after": {"destination": 1}})
    assert verdict_of("P1", changed(history, change)).outcome is HELD


def test_a_kernel_without_peaks_is_said_to_have_none() -> None:
    assert verdict_of("P1", moved()).reason.endswith("this kernel has no misc.peak to ask about between")


def refused(key: str = "sev") -> Builder:
    """A move that is charged below a limit that stops it further up."""
    b = begun()
    b.launch("old", "source", key)
    b.launch("new", "destination")
    b.observe("before", {"source": 1}, key=key)
    b.do("send_fd", "source", vm="old", to="destination")
    b.move("old", "new", "destination", error=16)
    b.observe("after", {"source": 1}, key=key)
    return b


@pytest.mark.parametrize(("highest", "outcome"), [(1, HELD), (2, DEVIATED)])
def test_a_charge_that_was_refused_further_up_was_there_for_an_instant(highest: int, outcome: Outcome) -> None:
    peaks = {"start": FILLED, "before": {"source": 1}, "after": {"destination": highest}}
    assert verdict_of("P1", peaked(refused().finish(), peaks)).outcome is outcome


@pytest.mark.parametrize(("highest", "outcome"), [(2, HELD), (3, DEVIATED)])
def test_moves_under_way_at_the_same_time_add_up(highest: int, outcome: Outcome) -> None:
    b = begun()
    for name in ("one", "two"):
        b.launch(name, "source", "sev")
        b.launch(f"{name}-new", "destination")
        b.do("send_fd", "source", vm=name, to="destination")
    b.observe("before", {"source": 2})
    pending = [b.invoke("move", "destination", vm=f"{name}-new", source=name) for name in ("one", "two")]
    for invoke in pending:
        b.done(invoke, "fail", error=16)
    b.observe("after", {"source": 2})
    peaks = {"start": FILLED, "before": {"source": 2}, "after": {"destination": highest}}
    assert verdict_of("P1", peaked(b.finish(), peaks)).outcome is outcome


@pytest.mark.parametrize(("highest", "outcome"), [(1, HELD), (2, DEVIATED)])
def test_a_loop_of_moves_charges_one_at_a_time(highest: int, outcome: Outcome) -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.observe("before", {"source": 1})
    b.do("send_fd", "source", vm="old", to="destination")
    loop = b.invoke("moves", "destination", vm="new", sources=["old"], rounds=9, threads=4)
    b.done(loop, value={"old EBUSY": 36})
    b.observe("after", {"source": 1})
    peaks = {"start": FILLED, "before": {"source": 1}, "after": {"destination": highest}}
    assert verdict_of("P1", peaked(b.finish(), peaks)).outcome is outcome


@pytest.mark.parametrize(("highest", "outcome"), [(2, HELD), (3, DEVIATED)])
def test_loops_of_moves_under_way_at_the_same_time_add_up_at_every_level(highest: int, outcome: Outcome) -> None:
    """Two are charged in the source's cgroup, and the run's own has two more while both are moved."""
    b = begun()
    names = ("one", "two")
    for name in names:
        b.launch(name, "source", "sev")
        b.launch(f"{name}-new", "destination")
    b.observe("before", {"source": 2})
    loops = [
        b.invoke("moves", "destination", vm=f"{name}-new", sources=[f"{name}-new", name], rounds=9) for name in names
    ]
    for name, loop in zip(names, loops, strict=True):
        b.done(loop, value={f"{name} EBUSY": 9})
    b.observe("after", {"source": 2})
    peaks = {"before": {"source": 2, ".": 2}, "after": {"destination": highest, ".": 2 + highest}}
    assert verdict_of("P1", peaked(b.finish(), peaks)).outcome is outcome


@pytest.mark.parametrize(("highest", "outcome"), [(1, HELD), (2, DEVIATED)])
def test_a_loop_of_moves_within_a_cgroup_charges_nothing_ahead(highest: int, outcome: Outcome) -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "source")
    b.observe("before", {"source": 1})
    b.done(b.invoke("moves", "source", vm="new", sources=["old"], rounds=9), value={"old EBUSY": 9})
    b.observe("after", {"source": 1})
    peaks = {"start": FILLED, "before": {"source": 1}, "after": {"source": highest}}
    assert verdict_of("P1", peaked(b.finish(), peaks)).outcome is outcome


@pytest.mark.parametrize("f", ["disable_misc", "enable_misc"])
@pytest.mark.parametrize(("highest", "signature"), [(0, ""), (1, "peak-too-high-before-move:sev")])
def test_where_the_controller_was_taken_away_or_given_the_files_below_begin_anew(
    f: str, highest: int, signature: str
) -> None:
    """The files of that cgroup itself are those that were there before."""
    b = begun()
    b.launch("old", "destination", "sev")
    b.observe("before", {"destination": 1})
    b.do("close", "destination", vm="old")
    b.do(f, "", cgroup=".")
    b.observe("again")
    peaks = {"start": FILLED, "before": {"destination": 1}, "again": {"destination": highest}}
    assert verdict_of("P1", peaked(b.finish(), peaks)).signature == signature


def test_a_cgroup_that_was_made_again_begins_anew() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.observe("before", {"source": 1})
    b.do("close", "source", vm="old")
    b.do("enter", "source", cgroup="destination")
    b.do("remove_cgroup", "", cgroup="source")
    b.do("add_cgroup", "", cgroup="source")
    b.observe("again")
    history, up = b.finish(), {"start": FILLED, "before": {"source": 1}}
    assert verdict_of("P1", peaked(history, {**up, "again": {"source": 0}})).outcome is not DEVIATED
    assert verdict_of("P1", peaked(history, up)).signature == "peak-too-high-before-move:sev"


def test_a_finding_explains_as_many_as_there_were_moves_to_make() -> None:
    up = {"start": FILLED, "before": {"source": 0}}
    for highest, signature in ((1, "under-wrong-key-after-es-move"), (2, "peak-too-high-after-move:sev")):
        verdict = verdict_of("P1", peaked(moved_es(), {**up, "after": {"destination": highest}}))
        assert verdict.signature == signature


BY_ES, TOO_HIGH = "under-wrong-key-after-es-move", "peak-too-high-after-move"


@pytest.mark.parametrize(
    ("key", "cgroup", "highest", "signature"),
    [
        ("sev", "destination", 1, BY_ES),
        ("sev", "destination", 2, f"{TOO_HIGH}:sev"),
        ("sev", "source", 1, f"{TOO_HIGH}:sev"),
        ("sev_es", "source", 2, f"{TOO_HIGH}:sev_es"),  # nothing was taken off there
    ],
)
def test_a_move_that_failed_was_charged_under_the_wrong_key_until_it_did(
    key: str, cgroup: str, highest: int, signature: str
) -> None:
    peaks = {"start": FILLED, "before": {"source": int(key == "sev_es")}, "after": {cgroup: highest}}
    assert verdict_of("P1", peaked(refused(key="sev_es").finish(), peaks, key=key)).signature == signature


@pytest.mark.parametrize(("highest", "signature"), [(2, BY_ES), (3, f"{TOO_HIGH}:sev")])
def test_each_context_that_was_moved_under_the_wrong_key_explains_one_more(highest: int, signature: str) -> None:
    b = begun()
    for number in range(2):
        b.launch(f"old-{number}", "source", "sev_es")
        b.launch(f"new-{number}", "destination")
        b.do("send_fd", "source", vm=f"old-{number}", to="destination")
    b.observe("before", {"source": 2}, key="sev_es")
    for number in range(2):
        b.move(f"old-{number}", f"new-{number}", "destination")
    b.observe("after", {"destination": 2}, key="sev_es")
    peaks = {"start": FILLED, "after": {"destination": highest}}
    assert verdict_of("P1", peaked(b.finish(), peaks)).signature == signature


@pytest.mark.parametrize(
    ("source", "destination", "signature"),
    [(2, 1, BY_ES), (3, 1, f"{TOO_HIGH}:sev_es"), (1, 2, f"{TOO_HIGH}:sev_es")],
)
def test_what_a_move_under_the_wrong_key_has_not_taken_off_comes_on_top_of_what_is_charged_later(
    source: int, destination: int, signature: str
) -> None:
    b = begun()
    b.launch("old", "source", "sev_es")
    b.launch("new", "destination")
    b.observe("before", {"source": 1}, key="sev_es")
    b.do("send_fd", "source", vm="old", to="destination")
    b.move("old", "new", "destination")
    b.launch("another", "source", "sev_es")
    b.observe("after", {"source": 1, "destination": 1}, key="sev_es")
    peaks = {"start": FILLED, "before": {"source": 1}, "after": {"source": source, "destination": destination}}
    assert verdict_of("P1", peaked(b.finish(), peaks, key="sev_es")).signature == signature


@pytest.mark.parametrize(
    ("highest", "signature"), [(2, "overcharged-after-mirror-move:sev"), (3, "peak-too-high-after-move:sev")]
)
def test_each_mirror_that_was_moved_explains_one_more(highest: int, signature: str) -> None:
    b = begun()
    b.launch("owner", "source", "sev")
    for number in range(2):
        b.do("create", "source", vm=f"mirror-{number}", kind="mirror", vcpus=1, memory="guest")
        b.do("mirror", "source", vm=f"mirror-{number}", source="owner")
        b.launch(f"new-{number}", "destination")
    b.observe("before", {"source": 1})
    for number in range(2):
        b.do("send_fd", "source", vm=f"mirror-{number}", to="destination")
        b.move(f"mirror-{number}", f"new-{number}", "destination")
    b.observe("after", {"source": 1})
    peaks = {"start": FILLED, "before": {"source": 1}, "after": {"destination": highest}}
    assert verdict_of("P1", peaked(b.finish(), peaks)).signature == signature


def test_of_a_move_that_was_killed_nobody_can_say_which_charges_a_finding_explains() -> None:
    """That it took effect shows only in what the source answers."""
    b = begun()
    b.launch("old", "source", "sev_es")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    move = b.invoke("move", "destination", vm="new", source="old")
    b.kill("destination")
    b.done(move, "info")
    b.ask("old", "source", dead=True)
    seen = b.observe("after", {}, guests=0)
    seen.misc["destination"]["current"]["sev"] = 1
    assert verdict_of("P1", b.history()).signature == "overcharged-after-close:sev"
    too_high = verdict_of("P1", peaked(b.history(), {"start": FILLED, "after": {"destination": 2}}))
    assert too_high.signature == "overcharged-after-close:sev+peak-too-high-after-move:sev"


def test_a_peak_that_a_moved_mirror_explains_has_the_signature_of_its_finding() -> None:
    b = begun()
    b.launch("owner", "source", "sev")
    b.do("create", "source", vm="mirror", kind="mirror", vcpus=1, memory="guest")
    b.do("mirror", "source", vm="mirror", source="owner")
    b.launch("new", "destination")
    b.observe("before", {"source": 1})
    b.do("send_fd", "source", vm="mirror", to="destination")
    b.move("mirror", "new", "destination")
    b.observe("after", {"source": 1})
    history, up = b.finish(), {"start": FILLED, "before": {"source": 1}}
    for highest, signature in ((1, "overcharged-after-mirror-move:sev"), (2, "peak-too-high-after-move:sev")):
        verdict = verdict_of("P1", peaked(history, {**up, "after": {"destination": highest}}))
        assert verdict.signature == signature
        assert f"destination sev {highest}" in verdict.seen.split("; ")
