# SPDX-License-Identifier: Apache-2.0
"""The ledger and the tree of cgroups: charges stay where they were made, whatever becomes of that place (P11)."""

from __future__ import annotations

import pytest

from tests.unit.core.build import Builder
from tests.unit.core.on_ledger import ledger


def tenants() -> Builder:
    """A guest in a cgroup, one in a cgroup below it, and one beside it whose name begins the same."""
    b = Builder()
    for agent, cgroup in (("outer", "ten"), ("inner", "ten/below"), ("beside", "tenant")):
        b.spawn(agent, cgroup)
        b.launch(f"of-{agent}", agent, "sev")
    return b


def wrong(b: Builder, **charges: int) -> set[str]:
    """The cgroups whose counters are not these; "ten_below" is ten/below, and the run's own has the sum of the two
    upper ones."""
    read = {name.replace("_", "/"): charge for name, charge in charges.items()}
    b.observe("seen", {**read, ".": read["ten"] + read["tenant"]})
    replayed = ledger(b)
    assert not replayed.lost
    return {mismatch.where for mismatch in replayed.mismatches("charge")}


@pytest.mark.parametrize("f", ["enter", "remove_cgroup", "disable_misc"])
def test_a_charge_stays_below_whatever_was_above_it(f: str) -> None:
    b = tenants()
    if f == "enter":
        b.do(f, "inner", cgroup="tenant")
    elif f == "remove_cgroup":
        b.do("enter", "inner", cgroup="tenant")
        b.do(f, "", cgroup="ten/below")
    else:
        b.do(f, "", cgroup="ten")
    below = int(f == "enter")
    assert wrong(b, ten=2, ten_below=below, tenant=1) == set()
    assert wrong(b, ten=2, ten_below=1 - below, tenant=1) == {"ten/below"}


def test_what_comes_after_a_process_went_elsewhere_is_charged_there() -> None:
    b = tenants()
    b.do("enter", "inner", cgroup="tenant")
    b.launch("another", "inner", "sev")
    assert wrong(b, ten=2, ten_below=1, tenant=2) == set()
    b.do("close", "inner", vm="another")
    assert wrong(b, ten=2, ten_below=1, tenant=1) == set()


def test_a_cgroup_that_was_made_again_has_nothing_of_the_one_before() -> None:
    b = tenants()
    b.do("enter", "inner", cgroup="tenant")
    for f in ("remove_cgroup", "add_cgroup"):
        b.do(f, "", cgroup="ten/below")
    b.do("enter", "inner", cgroup="ten/below")
    b.launch("another", "inner", "sev")
    assert wrong(b, ten=3, ten_below=1, tenant=1) == set()
    b.do("close", "inner", vm="of-inner")
    assert wrong(b, ten=2, ten_below=1, tenant=1) == set()


def test_without_the_controller_below_it_a_cgroup_is_charged_for_all_who_live_there() -> None:
    b = tenants()
    b.do("disable_misc", "", cgroup="ten")
    b.launch("another", "inner", "sev")
    b.launch("a-third", "beside", "sev")
    assert wrong(b, ten=3, ten_below=0, tenant=2) == set()
    b.do("enable_misc", "", cgroup="ten")
    b.launch("late", "inner", "sev")
    assert wrong(b, ten=4, ten_below=1, tenant=2) == set()


def test_a_charge_that_was_taken_ahead_stays_where_it_was_taken() -> None:
    """A move is stopped when it has charged its cgroup, which loses its controller, and goes back."""
    b = tenants()
    b.launch("new", "inner")
    move = b.invoke("move", "inner", vm="new", source="of-beside")
    b.hold_at(move, function="sev_lock_vcpus_for_migration")
    assert wrong(b, ten=3, ten_below=2, tenant=1) == set()
    b.do("disable_misc", "", cgroup="ten")
    assert wrong(b, ten=3, ten_below=0, tenant=1) == set()
    b.done(move)
    assert wrong(b, ten=3, ten_below=0, tenant=0) == set()
