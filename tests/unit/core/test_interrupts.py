# SPDX-License-Identifier: Apache-2.0
"""P5 for interrupts: where a signal is due, what shows that it has arrived, and what shows nothing."""

from __future__ import annotations

from errno import EBADF, EBUSY, EIO

from chaos.history.records import History
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import Builder
from tests.unit.core.doctored import verdict_of

BESIDE = "interrupt-lost-beside-the-dead"
MODERN = "7.3.4"


class Run(Builder):
    """A guest that was counted, before and after its move from `old` to `new`, with interrupts."""

    def __init__(self, kernel: str = "6.12.117") -> None:
        super().__init__(kernel=kernel)
        self.begin()
        self.launch("old", "source", "sev")
        self.launch("new", "destination")
        self.where = {"old": "source", "new": "destination"}
        self.count("old", "source", 100)
        self.status("old", "source")

    def bind(self, vm: str, *gsis: int, assign: bool = True, error: int = 0) -> None:
        for gsi in gsis:
            self.do("irqfd", self.where[vm], vm=vm, gsi=gsi, assign=assign, error=error)

    def free(self, vm: str, *gsis: int) -> None:
        self.bind(vm, *gsis, assign=False)

    def signal(self, *gsis: int) -> None:
        for gsi in gsis:
            self.do("signal", "", gsi=gsi)

    def look(self, vm: str, *vectors: int) -> None:
        invoke = self.invoke("interrupts", self.where[vm], vm=vm)
        self.done(invoke, value={"vectors": list(vectors)})

    def read(self) -> None:
        self.do("get_state", "source", vm="old", within_ms=1)

    def moves(self, *, read: bool = True, give: bool = True) -> None:
        if read:
            self.read()
        self.do("send_fd", "source", vm="old", to="destination")
        self.move("old", "new", "destination")
        if give:
            self.give_state("new", "destination")

    def over(self, error: int = 0) -> History:
        self.status("new", "destination", error=error)
        self.count("new", "destination", 200)
        self.ask("old", "source", dead=True)
        return self.finish()

    def judged(self) -> Verdict:
        return verdict_of("P5", self.over())


def moved(kernel: str = "6.12.117") -> Run:
    run = Run(kernel)
    run.bind("old", 48)
    run.moves()
    return run


def beside_the_dead() -> History:
    """Finding 0009, with what finding 0001 has beside it on the same kernels."""
    run = moved()
    run.bind("new", 48)
    run.signal(48)
    run.free("new", 48)
    run.look("new")
    return run.over(error=EBADF)


def test_one_that_is_pending_at_the_guests_vm_has_arrived() -> None:
    run = moved()
    run.bind("new", 49)
    run.signal(49)
    run.look("new", 49)
    verdict = run.judged()
    assert verdict.outcome is Outcome.KEPT
    assert "signals of GSI 49: written while its eventfd was bound to new, and pending at new" in verdict.reason


def test_one_that_is_not_is_lost_once_nothing_is_on_its_way() -> None:
    run = moved()
    run.bind("new", 49)
    run.signal(49)
    run.free("new", 49)
    run.look("new")
    verdict = run.judged()
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "interrupt-lost")


def test_the_dead_source_that_still_has_the_eventfd_is_named_in_the_signature() -> None:
    assert verdict_of("P5", beside_the_dead()).signature == f"guest_status-after-move:EBADF+{BESIDE}"


def test_of_one_that_is_written_while_its_eventfd_is_being_bound_nobody_can_say() -> None:
    run = moved()
    binding = run.invoke("irqfd", "destination", vm="new", gsi=49, assign=True)
    run.signal(49)
    run.done(binding)
    verdict = run.judged()
    assert (verdict.outcome, verdict.signature) == (Outcome.UNKNOWN, "")
    assert "nobody can say whom its eventfd was bound to when it was written" in verdict.reason


def test_where_kvm_refuses_openly_nothing_is_due_at_the_guest() -> None:
    run = moved(MODERN)
    run.bind("new", 48, error=EBUSY)
    run.signal(48)
    run.look("new")
    assert run.judged().outcome is Outcome.KEPT


def test_the_source_has_its_eventfds_until_its_last_descriptor_is_closed() -> None:
    run = moved()
    run.bind("new", 48, 49)
    run.do("close", "source", vm="old")
    run.signal(48)
    run.free("new", 48)
    run.look("new")
    assert run.judged().signature == "interrupt-lost"


def test_one_may_still_be_on_its_way_while_its_eventfd_is_bound() -> None:
    run = moved()
    run.bind("new", 49)
    run.signal(49)
    run.look("new")
    verdict = run.judged()
    assert verdict.outcome is Outcome.UNKNOWN and "where it may be on its way" in verdict.reason


def test_one_that_nobody_looked_for_is_unknown() -> None:
    run = moved()
    run.bind("new", 49)
    run.signal(49)
    assert run.judged().outcome is Outcome.UNKNOWN


def test_one_that_lay_in_its_eventfd_is_due_at_whoever_is_bound_next() -> None:
    for vectors, outcome in (((49,), Outcome.KEPT), ((), Outcome.BROKEN)):
        run = Run()
        run.signal(49)
        run.moves()
        run.bind("new", 49)
        run.free("new", 49)
        run.look("new", *vectors)
        assert run.judged().outcome is outcome


def test_one_that_was_bound_to_the_destination_before_the_move_is_nobodys() -> None:
    run = Run()
    run.signal(49)
    run.bind("new", 49)
    run.moves()
    run.free("new", 49)
    run.look("new")
    verdict = run.judged()
    assert verdict.outcome is Outcome.UNKNOWN and "bound to new before that had the guest" in verdict.reason


def test_one_goes_with_the_state_that_is_read_after_it() -> None:
    for vectors, signature in (((48,), ""), ((), "interrupt-lost-in-move")):
        run = Run()
        run.bind("old", 48)
        run.signal(48)
        run.free("old", 48)
        run.moves()
        run.look("new", *vectors)
        verdict = run.judged()
        assert verdict.signature == signature
        assert verdict.outcome is (Outcome.BROKEN if signature else Outcome.KEPT)


def test_one_that_may_have_come_after_the_state_was_read_is_not_lost_by_the_kernel() -> None:
    bound, late, bare = Run(), Run(), Run()
    for run in (bound, late, bare):
        run.bind("old", 48)
    bound.signal(48)  # and never taken away: it may have arrived after the state was read
    bound.moves()
    late.read()
    late.signal(48)
    late.moves(read=False)
    bare.signal(48)
    bare.free("old", 48)
    bare.moves(read=False, give=False)
    bare.give_state("new", "destination")
    for run in (bound, late, bare):
        run.look("new")
        assert run.judged().outcome is Outcome.UNKNOWN


def test_one_that_is_pending_after_all_has_arrived_all_the_same() -> None:
    run = Run()
    run.bind("old", 48)
    run.signal(48)
    run.moves()
    run.look("new", 48)
    assert run.judged().outcome is Outcome.KEPT


def test_what_has_arrived_has_to_stay() -> None:
    run = Run()
    run.bind("old", 48)
    run.signal(48)
    run.look("old", 48)
    run.moves()
    run.look("new")
    assert run.judged().signature == "interrupt-lost-in-move"
    late = Run()  # what was read before it came was carried, and does not have it
    late.bind("old", 48)
    late.read()
    late.signal(48)
    late.look("old", 48)
    late.moves(read=False)
    late.look("new")
    assert late.judged().outcome is Outcome.KEPT


def test_a_second_signal_of_a_gsi_says_nothing() -> None:
    run = moved()
    run.bind("new", 49)
    run.signal(49, 49)
    run.look("new", 49)
    verdict = run.judged()
    assert verdict.outcome is Outcome.UNKNOWN and "written before" in verdict.reason


def test_those_of_which_the_same_is_to_be_said_are_one_part() -> None:
    run = moved()
    run.bind("new", 49, 50, 51, 60)
    run.signal(49, 50, 51, 60)
    run.look("new", 49, 50, 51, 60)
    assert "signals of GSI 49-51, 60: " in run.judged().reason


def test_a_dead_source_that_is_torn_down_must_answer_eio() -> None:
    for error, outcome in ((EIO, Outcome.KEPT), (0, Outcome.BROKEN)):
        run = Run()
        run.do("ioeventfd", "source", vm="old", port=32, assign=True)
        run.bind("old", 48)
        run.moves()
        run.do("ioeventfd", "source", vm="old", port=32, assign=False, error=error)
        run.bind("old", 48, assign=False, error=error)
        run.do("set_memory", "source", vm="old", there=False, slot=2, error=error)
        history = run.over()
        assert verdict_of("P3", history).outcome is outcome
        assert verdict_of("P7", history).outcome is outcome
