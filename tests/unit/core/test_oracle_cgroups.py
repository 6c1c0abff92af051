# SPDX-License-Identifier: Apache-2.0
"""The oracle on cgroups: limits that go with their files, events that stay above, and who may make what."""

from __future__ import annotations

from dataclasses import replace
from errno import EBADF, EBUSY, EEXIST, EINVAL, ENOENT, EPIPE

from chaos.judge import oracle
from chaos.judge.ledger.world import Reference
from chaos.judge.oracle import OK, OracleAnswer, State, after, allowed, events, under_way
from tests.unit.core.test_oracle import NEW, does, errnos, host, launched, op


def with_limit(cgroup: str) -> State:
    return does(host(), "limit", cgroup=cgroup, key="sev", max=0)


def refused(state: State, agent: str, at: str) -> State:
    """An INIT of its is refused for the limit there."""
    state = does(state, "create", agent, vm=f"of-{agent}", kind="sev", vcpus=0)
    return after(state, op("init", agent, vm=f"of-{agent}", key="sev"), OracleAnswer(EBUSY, at=at))


def test_what_no_limit_of_ours_has_refused_counts_no_event() -> None:
    """Neither a wrong argument does, nor the host's own level, which is full of what others have."""
    state = does(replace(host(), foreign=frozenset({("sev", 4)})), "create", "s", vm="v", kind="sev", vcpus=0)
    for args, error in (({"flags": 1}, EINVAL), ({}, EBUSY)):
        state = after(state, op("init", "s", vm="v", key="sev", **args), OracleAnswer(error))
    assert not events(state)


def test_a_limit_goes_with_its_cgroup_and_what_it_has_refused_stays_counted_above() -> None:
    state = refused(with_limit("destination/inner"), "d", "destination/inner")
    state = does(state, "limit", cgroup="source", key="sev", max=0)
    state = does(does(state, "enter", "d", cgroup="source"), "remove_cgroup", cgroup="destination/inner")
    assert errnos(state, "limit", "", cgroup="destination/inner", key="sev", max=0) == {ENOENT}
    state = does(does(state, "add_cgroup", cgroup="destination/inner"), "enter", "d", cgroup="destination/inner")
    assert allowed(state, op("init", "d", vm="of-d", key="sev")) >= {OK}
    assert [events(state)[level, "sev"] for level in (".", "destination", "destination/inner")] == [1, 1, 0]
    refused(state, "s", "source")  # whose limit has stayed


def test_limits_below_a_cgroup_go_with_the_controller_and_its_own_stays() -> None:
    state = does(refused(with_limit("destination/inner"), "d", "destination/inner"), "enter", "d", cgroup="source")
    state = does(state, "limit", cgroup="destination", key="sev", max=1)
    state = does(does(state, "disable_misc", cgroup="destination"), "enable_misc", cgroup="destination")
    state = does(state, "enter", "d", cgroup="destination/inner")
    assert [events(state)[level, "sev"] for level in (".", "destination", "destination/inner")] == [1, 1, 0]
    state = does(state, "init", "d", vm="of-d", key="sev")
    state = does(state, "create", "d", vm="more", kind="sev", vcpus=0)
    assert allowed(state, op("init", "d", vm="more", key="sev")) == {OracleAnswer(EBUSY, at="destination")}


def test_a_limit_is_of_one_key_of_one_cgroup_until_it_is_set_again() -> None:
    state = does(with_limit("source"), "limit", cgroup="source", key="sev_es", max=0)
    state = does(state, "limit", cgroup="destination", key="sev", max=0)
    state = does(state, "limit", cgroup="source", key="sev", max=1)
    for vm, agent, key, error in (("a", "s", "sev_es", EBUSY), ("b", "d", "sev", EBUSY), ("c", "d", "sev_es", 0)):
        state = does(state, "create", agent, vm=vm, kind=key, vcpus=0)
        assert errnos(state, "init", agent, vm=vm, key=key) >= {error}
        assert (0 in errnos(state, "init", agent, vm=vm, key=key)) == (error == 0)
    state = launched(state, vcpus=0)
    state = does(state, "create", "s", vm="more", kind="sev", vcpus=0)
    assert errnos(state, "init", "s", vm="more", key="sev") == {EBUSY}
    state = does(state, "limit", cgroup="source", key="sev", max="max")
    assert 0 in errnos(state, "init", "s", vm="more", key="sev")


def test_the_dead_make_nothing_and_what_is_done_from_outside_needs_nobody() -> None:
    state = does(host(), "kill", "s")
    for f in ("create", "enter", "exit", "kill", "move", "close"):
        assert allowed(state, op(f, "s", vm="v", cgroup="source")) == frozenset(), f
    assert errnos(state, "limit", "nobody", cgroup="source", key="sev", max=1) == {0}
    assert allowed(state, op("psp_dies", "nobody")) == {OK}
    assert allowed(state, op("spawn", "s", cgroup="source")) == {OK}  # another of that name


def test_a_cgroup_is_made_once_below_one_that_is_there_and_goes_when_nobody_uses_it() -> None:
    state = does(host(), "enter", "d", cgroup="source")
    assert errnos(state, "add_cgroup", "", cgroup="destination/inner") == {EEXIST}
    assert errnos(state, "add_cgroup", "", cgroup="destination/other/inner") == {ENOENT}
    assert errnos(state, "remove_cgroup", "", cgroup="source") == {EBUSY}  # they live there
    assert errnos(state, "remove_cgroup", "", cgroup="destination") == {EBUSY}  # it has a child
    state = does(does(state, "add_cgroup", cgroup="destination2"), "remove_cgroup", cgroup="destination/inner")
    state = does(state, "remove_cgroup", cgroup="destination")  # the other's name only begins like a child's
    assert errnos(state, "spawn", "x", cgroup="destination") == {ENOENT}
    assert errnos(does(state, "remove_cgroup", cgroup="destination2"), "remove_cgroup", "", cgroup=".") == {EBUSY}


def test_the_controller_is_taken_from_children_that_have_not_given_it_on() -> None:
    state = does(host(), "add_cgroup", cgroup="source/inner")
    assert errnos(state, "disable_misc", "", cgroup="destination/inner") == {0}  # which has no child
    deeper = does(state, "add_cgroup", cgroup="destination/inner/innermost")
    assert errnos(deeper, "disable_misc", "", cgroup="destination") == {EBUSY}
    for cgroup in ("source", "destination"):
        assert errnos(state, "disable_misc", "", cgroup=".") == {EBUSY}
        assert errnos(state, "disable_misc", "", cgroup=cgroup) == {0}
        state = does(state, "disable_misc", cgroup=cgroup)
    state = does(state, "disable_misc", cgroup=".")
    for f in ("disable_misc", "enable_misc"):
        assert errnos(state, f, "", cgroup="destination") == {ENOENT}  # it has none itself
    assert errnos(state, "limit", "", cgroup="source", key="sev", max=0) == {ENOENT}


def test_the_controller_is_not_given_on_by_a_cgroup_that_processes_live_in() -> None:
    state = does(does(host(), "disable_misc", cgroup="source"), "disable_misc", cgroup="destination")
    assert errnos(state, "enable_misc", "", cgroup="source") == {EBUSY}
    assert errnos(state, "enable_misc", "", cgroup="destination") == {0}  # they live below it
    assert errnos(does(state, "kill", "s"), "enable_misc", "", cgroup="source") == {0}
    at_the_top = does(does(state, "spawn", "x", cgroup="."), "disable_misc", cgroup=".")
    assert errnos(at_the_top, "enable_misc", "", cgroup=".") == {EBUSY}  # which is no root


def test_the_run_s_own_cgroup_is_not_removed() -> None:
    assert errnos(oracle.new(NEW, {"sev": 1}), "remove_cgroup", "", cgroup=".") == {EBUSY}


def test_a_process_has_the_vms_that_it_opened_and_has_not_lost() -> None:
    state = does(launched(host()), "create", "d", vm="new", kind="plain", vcpus=1)
    state = does(does(state, "connect", "s", vm="old", peer="new"), "send_fd", "s", vm="old", to="d")
    moving = under_way(state, op("move", "d", vm="new", source="old"))
    assert errnos(moving, "close", "d", vm="old") == {EBADF}  # the call holds it, and nobody else there
    assert errnos(moving, "close", "s", vm="old") == {0}
    lost = {Reference("old", "s", lost=True)}
    references = state.world.references - {Reference("old", "s")} | lost
    without = replace(state, world=replace(state.world, references=references))
    for f in ("send_fd", "guest_status"):
        assert errnos(without, f, "s", vm="old", to="d") == {EBADF}


def test_a_descriptor_is_sent_to_a_process_that_lives_or_to_whoever_takes_it() -> None:
    state = launched(host())
    assert errnos(state, "send_fd", "s", vm="old", to="") == errnos(state, "send_fd", "s", vm="old", to="d") == {0}
    assert errnos(does(state, "kill", "d"), "send_fd", "s", vm="old", to="d") == {EPIPE}
