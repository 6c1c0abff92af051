# SPDX-License-Identifier: Apache-2.0
"""A written finding excuses what it describes, to the unit, and not another defect that looks like it."""

from __future__ import annotations

from errno import EBADF, EBUSY, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY

import msgspec
import pytest

from chaos.history.records import History, Observation
from chaos.judge import findings
from tests.unit.core.build import KERNEL, Builder, changed
from tests.unit.core.doctored import DEVIATED, HELD, begun, verdict_of, without
from tests.unit.core.test_contexts import Told

KNOWN = findings.load()
ES = "sev_es"
BY_ES = "under-wrong-key-after-es-move"


def excused(promise: str, history: History, kernel: str = KERNEL) -> str:
    """The number of the finding that the deviation is, "" if it is none."""
    verdict = verdict_of(promise, history)
    assert verdict.outcome is DEVIATED, verdict.reason
    found = findings.matching(verdict, kernel, KNOWN)
    return found.id if found is not None else ""


def read(b: Builder, label: str, *charged: tuple[str, str, int], guests: int = 1) -> Observation:
    """An observation in which these counters are not 0."""
    seen = b.observe(label, {}, guests=guests)
    for cgroup, key, value in charged:
        seen.misc[cgroup]["current"][key] = value
    return seen


def moved_es(*, more: tuple[tuple[str, str, int], ...] = (), left: tuple[tuple[str, str, int], ...] = ()) -> History:
    """A SEV-ES guest is moved and charged under the wrong key. `more` are counters that are wrong beside, after the
    move; `left` those at the end."""
    b = begun()
    b.launch("old", "source", ES)
    b.launch("new", "destination")
    read(b, "before", (".", ES, 1), ("source", ES, 1))
    b.do("send_fd", "source", vm="old", to="destination")
    b.move("old", "new", "destination")
    wrong = (("source", "sev", -1), ("source", ES, 1), ("destination", "sev", 1))
    read(b, "after", (".", ES, 1), *wrong, *more)
    b.do("close", "destination", vm="new")
    for agent in ("source", "destination"):
        b.exit(agent)
    read(b, "end", *wrong, ("destination", ES, -1), *left, guests=0)
    b.fill("end")
    return b.end()


def test_a_context_under_the_wrong_key() -> None:
    assert (excused("P1", moved_es()), excused("P9", moved_es())) == ("0002", "0002")


@pytest.mark.parametrize(
    "more",
    [
        ("destination", "sev", 2),  # charged twice
        ("source", ES, 2),
        ("destination", ES, 1),  # under both keys
        (".", "sev", 1),  # above the cgroups that are wrong
    ],
)
def test_more_than_a_context_under_the_wrong_key(more: tuple[str, str, int]) -> None:
    assert excused("P1", moved_es(more=(more,))) == ""
    assert excused("P1", moved_es(left=(more,))) == ""
    assert excused("P9", moved_es(left=(more,))) == ""


def es_into(
    *, limit: dict[str, int], error: int, events: dict[str, int], before: dict[str, int] | None = None
) -> History:
    """A SEV-ES guest is moved into a cgroup with these limits, is answered so, and these events are counted there then,
    and those `before`."""
    b = begun()
    b.launch("old", "source", ES)
    b.do("launch_update_vmsa", "source", vm="old")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    _limited(b, "before", limit, before or {})
    b.move("old", "new", "destination", error=error)
    _limited(b, "after", limit, events)
    return b.end()


def _limited(b: Builder, label: str, limit: dict[str, int], events: dict[str, int]) -> None:
    seen = read(b, label, (".", ES, 1), ("source", ES, 1))
    for cgroup, files in seen.misc.items():
        here = cgroup == "destination"
        counted = {f"{key}.max": events.get(key, 0) if here or cgroup == "." else 0 for key in ("sev", ES)}
        files |= {"max": limit if here else {}, "events": counted}


@pytest.mark.parametrize(
    ("promise", "limit", "error", "events", "finding"),
    [
        ("P7", {"sev": 0}, EBUSY, {"sev": 1}, "0002"),
        ("P7", {"sev": 0}, EBUSY, {}, ""),  # nobody has refused a charge of sev: it was busy for another reason
        ("P7", {}, EBUSY, {}, ""),  # nothing is in the way, whatever the key
        ("P7", {ES: 0}, 0, {}, "0002"),
        ("P7", {"sev": 0, ES: 0}, 0, {}, ""),  # over both limits
        ("P10", {ES: 0}, 0, {}, "0002"),
        ("P10", {"sev": 0, ES: 0}, 0, {}, ""),
        ("P10", {"sev": 0, ES: 0}, EBUSY, {"sev": 1}, "0002"),
        ("P10", {"sev": 0, ES: 0}, EBUSY, {"sev": 2}, ""),
        ("P10", {"sev": 0, ES: 0}, EBUSY, {}, ""),  # counted nowhere
    ],
)
def test_the_limits_of_the_other_key(
    promise: str, limit: dict[str, int], error: int, events: dict[str, int], finding: str
) -> None:
    assert excused(promise, es_into(limit=limit, error=error, events=events)) == finding


@pytest.mark.parametrize(("events", "finding"), [(1, ""), (2, "0002")])
def test_an_event_that_was_counted_before_the_move_is_none_of_its_own(events: int, finding: str) -> None:
    history = es_into(limit={"sev": 0}, error=EBUSY, before={"sev": 1}, events={"sev": events})
    assert excused("P7", history) == finding


@pytest.mark.parametrize("left_out", [("after",), ("start", "limits", "before")])
def test_an_ebusy_whose_events_were_not_read_on_both_sides_is_not_put_down_to_the_finding(
    left_out: tuple[str, ...],
) -> None:
    history = es_into(limit={"sev": 0}, error=EBUSY, events={"sev": 1})
    assert excused("P7", history) == "0002"
    for label in left_out:
        history = changed(history, without(Observation, label=label))
    assert excused("P7", history) == ""


def test_the_limit_of_its_own_key_stops_a_move_and_is_where_that_counts() -> None:
    for promise in ("P7", "P10"):
        verdict = verdict_of(promise, es_into(limit={ES: 0}, error=EBUSY, events={ES: 1}))
        assert verdict.outcome is HELD, verdict.reason


def moved_mirror(*, charged: int = 2, sev: int = 7, dying: int = 1) -> History:
    """A mirror is moved to the destination, where so much is charged then; in the end `sev` contexts can be had, and
    so many cgroups that were removed have not gone."""
    b = begun()
    b.launch("owner", "source", "sev")
    b.do("create", "source", vm="mirror", kind="mirror", vcpus=1, memory="guest")
    b.do("mirror", "source", vm="mirror", source="owner")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="mirror", to="destination")
    b.move("mirror", "new", "destination")
    b.observe("moved", {"source": 1, "destination": charged - 1}, guests=1)
    for agent in ("source", "destination"):
        b.exit(agent)
    b.observe("end", {"destination": 1}, guests=0)
    b.fill("end", sev=sev, dying=dying)
    return b.end()


def test_a_moved_mirror_is_charged_once_and_takes_one_context() -> None:
    assert [excused(promise, moved_mirror()) for promise in ("P1", "P2", "P9")] == ["0004"] * 3
    assert [excused(promise, moved_mirror(charged=3)) for promise in ("P1", "P2")] == ["", ""]
    assert excused("P9", moved_mirror(sev=6)) == ""
    assert [excused("P9", moved_mirror(dying=number)) for number in (0, 2)] == ["", ""]


@pytest.mark.parametrize(("source", "destination", "finding"), [(2, 0, "0004"), (1, 1, ""), (2, 1, ""), (3, 0, "")])
def test_a_mirror_that_is_moved_again_is_charged_where_it_was_moved_to_last(
    source: int, destination: int, finding: str
) -> None:
    b = begun()
    b.launch("owner", "source", "sev")
    b.do("create", "source", vm="mirror", kind="mirror", vcpus=1, memory="guest")
    b.do("mirror", "source", vm="mirror", source="owner")
    b.launch("new", "destination")
    b.launch("newer", "source")
    b.do("send_fd", "source", vm="mirror", to="destination")
    b.move("mirror", "new", "destination")
    b.do("send_fd", "destination", vm="new", to="source")
    b.move("new", "newer", "source")
    b.observe("moved", {"source": source, "destination": destination}, guests=1)
    assert excused("P1", b.end()) == finding


@pytest.mark.parametrize(
    ("between", "finding"),
    [
        ((("source", "sev", -1), ("source", ES, 1), ("destination", "sev", 1)), "0002"),
        ((("source", "sev", -1), ("destination", "sev", 1)), ""),  # the source's was given back, the destination's lost
    ],
)
def test_a_context_under_the_wrong_key_that_comes_back_is_charged_as_it_was(
    between: tuple[tuple[str, str, int], ...], finding: str
) -> None:
    for left_over in (False, True):
        b = begun()
        b.launch("old", "source", ES)
        b.launch("new", "destination")
        b.launch("newer", "source")
        b.do("send_fd", "source", vm="old", to="destination")
        b.move("old", "new", "destination")
        read(b, "between", (".", ES, 1), *between)
        b.do("send_fd", "destination", vm="new", to="source")
        b.move("new", "newer", "source")
        read(b, "back", (".", ES, 1), ("source", ES, 1), ("destination", "sev", int(left_over)))
        assert excused("P1", b.end()) == ("" if left_over else finding)


def test_a_counter_that_two_findings_have_made_wrong_is_excused_by_neither() -> None:
    """Each of them is about what one kind of move does to it."""
    b = begun()
    b.launch("owner", "source", ES)
    b.do("create", "source", vm="mirror", kind="mirror", vcpus=1, memory="guest")
    b.do("mirror", "source", vm="mirror", source="owner")
    for vm, new in (("owner", "new-owner"), ("mirror", "new-mirror")):
        b.launch(new, "destination")
        b.do("send_fd", "source", vm=vm, to="destination")
        b.move(vm, new, "destination")
    read(b, "after", (".", ES, 1), (".", "sev", 1), ("source", ES, 1), ("source", "sev", -1), ("destination", "sev", 2))
    verdict = verdict_of("P1", b.end())
    assert verdict.signature == f"overcharged-after-move:sev+{BY_ES}"
    assert excused("P1", b.history()) == ""


def mirror_asked(*, elsewhere: bool, moved: bool = False) -> History:
    """GUEST_STATUS of a mirror answers EBADF; its owner may have been moved before it was made."""
    b = begun()
    b.launch("owner", "source", "sev")
    owner, agent = "owner", "destination" if elsewhere or moved else "source"
    if moved:
        b.launch("new", "destination")
        b.do("send_fd", "source", vm="owner", to="destination")
        b.move("owner", "new", "destination")
        owner = "new"
    b.do("create", agent, vm="mirror", kind="mirror", vcpus=1, memory="guest")
    if elsewhere:
        b.do("send_fd", "source", vm=owner, to=agent)
    b.do("mirror", agent, vm="mirror", source=owner)
    b.status("mirror", agent, error=EBADF)
    return b.end()


def test_a_mirror_that_cannot_use_its_owners_descriptor() -> None:
    assert excused("P7", mirror_asked(elsewhere=True)) == "0005"
    assert excused("P7", mirror_asked(elsewhere=False, moved=True)) == "0001"
    assert excused("P7", mirror_asked(elsewhere=False)) == ""  # there the number is the right one


def crossed(*, at_once: bool) -> History:
    """Two VMs are moved into each other, the second into a dead one; it may have begun when that one lived."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.status("new", "destination", error=ENOTTY)
    b.do("send_fd", "source", vm="old", to="destination")
    b.do("send_fd", "destination", vm="new", to="source")
    slow = None
    if at_once:
        slow = b.invoke("move", "source", vm="old", source="new")
        b.move("old", "new", "destination")
    else:
        b.move("old", "new", "destination")
        slow = b.invoke("move", "source", vm="old", source="new")
    b.records[-1] = msgspec.structs.replace(b.done(slow), began=slow.t)
    b.observe("after", {"source": 1})
    b.status("old", "source", error=EIO)
    b.status("new", "destination", error=EIO)
    b.ask("old", "source", dead=True)
    b.ask("new", "destination", dead=True)
    return b.finish()


def test_a_vm_that_died_while_it_was_given_the_guest_is_no_dead_vm_that_is_given_one() -> None:
    assert [excused(promise, crossed(at_once=True)) for promise in ("P4", "P7")] == ["0007", "0007"]
    assert [excused(promise, crossed(at_once=False)) for promise in ("P4", "P7")] == ["", ""]
    into = [verdict_of("P5", crossed(at_once=at_once)).deviations for at_once in (True, False)]
    assert into == [("guest_status-after-move-into-the-dying:EIO",), ("guest_status-after-move:EIO",)]


def test_an_init_that_fails_without_a_flush_that_did() -> None:
    b = begun()
    b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
    for error in (EIO, EINVAL):
        b.do("init", "source", vm="old", key="sev", error=error)
        assert excused("P7", b.history()) == ""


def given_out_dirty(*, untold: bool) -> History:
    """LAUNCH_START is refused with DFFLUSH_REQUIRED; if `untold` after another that could not be told."""
    b = Told()
    b.begin()
    for vm in ("other", "old"):  # what is untold of another VM is none of this one's
        b.do("create", "source", vm=vm, kind="sev", vcpus=1, memory="guest")
        b.do("init", "source", vm=vm, key="sev")
        if untold or vm == "other":
            first = b.invoke("launch_start", "source", vm=vm, policy=0, read_only=True)
            for command in ("LAUNCH_START", "ACTIVATE", "DEACTIVATE", "DECOMMISSION"):
                b.sent(command, handle=1)
            b.done(first, "fail", error=EFAULT)
    refused = b.invoke("launch_start", "source", vm="old", policy=0)
    b.sent("LAUNCH_START", handle=1)
    b.sent("ACTIVATE", handle=1, status=15)
    b.sent("DECOMMISSION", handle=1)
    b.done(refused, "fail", error=EIO, firmware=15)
    return b.finish()


def test_an_asid_that_is_given_out_dirty() -> None:
    assert excused("P7", given_out_dirty(untold=True)) == "0017"
    assert excused("P7", given_out_dirty(untold=False)) == ""


def nothing_put(*, struck: int) -> History:
    """No ioeventfd can be put where one was taken away; if `struck` for want of memory for the bus without it."""
    b = begun()
    b.do("create", "source", vm="vm", kind="plain", vcpus=1, memory="guest")
    b.do("ioeventfd", "source", vm="vm", port=64, assign=True)
    taken = b.invoke("ioeventfd", "source", vm="vm", port=64, assign=False)
    b.done(taken, "ok", value={"fail_nth": 2, "struck": struck, "points": 2})
    b.do("ioeventfd", "source", vm="vm", port=64, assign=True, error=ENOMEM)
    return b.finish()


@pytest.mark.parametrize(("struck", "finding"), [(1, "0018"), (0, "")])
def test_a_bus_on_which_nothing_can_be_put(struck: int, finding: str) -> None:
    assert excused("P7", nothing_put(struck=struck), "7.3.4") == finding
