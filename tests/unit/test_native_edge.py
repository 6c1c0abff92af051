# SPDX-License-Identifier: Apache-2.0
"""Where in a thread's calls an answer begins: held against a search through calls that all are known."""

from __future__ import annotations

import struct
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.native import Edge, NativeCall, Ran, Why, edge
from chaos.native.layout import RECORD

EIO = 5
ODD = 0x500  # its bytes, moved by one, are those of EIO
ANSWERS = st.lists(st.sampled_from([0, EIO, 4, ODD]), max_size=40)


def calls_of(answers: list[int]) -> list[NativeCall]:
    return [
        NativeCall(3, place % 7, 100 + place * 10, 110 + place * 10, number) for place, number in enumerate(answers)
    ]


def ran(answers: list[int], kept: int, cut: int = 0) -> Ran:
    """A thread that was given these answers, of which the last `kept` are on record, `cut` of them before the wrap."""
    overwritten = max(0, len(answers) - kept)
    on_record = calls_of(answers)[overwritten:]
    data = b"".join(struct.pack(RECORD, call.began, call.ended, call.index, call.errno) for call in on_record)
    size = struct.calcsize(RECORD) * min(cut, len(on_record))
    return Ran(
        thread=3, tid=1, began=100, ended=1000, calls=len(answers), errnos=Counter(answers), why=Why.STOPPED, detail=0,
        overwritten=overwritten, clock_error=0, records=(memoryview(data)[:size], memoryview(data)[size:]),
        under_way=None,
    )  # fmt: skip


def truth(answers: list[int]) -> tuple[NativeCall | None, NativeCall | None]:
    calls = calls_of(answers)
    other = [call for call in calls if call.errno != EIO]
    first = [call for call in calls if call.errno == EIO]
    return (other[-1] if other else None), (first[0] if first else None)


@given(ANSWERS, st.integers(0, 40))
def test_with_all_on_record_both_are_found(answers: list[int], cut: int) -> None:
    assert edge(ran(answers, 40, cut), EIO) == Edge(*truth(answers), lost=False)


@given(ANSWERS, st.integers(1, 40), st.integers(0, 40))
def test_what_is_said_of_a_part_is_true_or_said_to_be_lost(answers: list[int], kept: int, cut: int) -> None:
    found = edge(ran(answers, kept, cut), EIO)
    if not found.lost:
        assert (found.other, found.first) == truth(answers)
    for call in (found.other, found.first):
        assert call is None or call in calls_of(answers)


@given(ANSWERS, st.integers(0, 40))
def test_nothing_is_lost_if_the_ring_goes_back_to_before_the_change(answers: list[int], more: int) -> None:
    """What a storm counts on: it ends so many calls after the first EIO, and has room for more than those."""
    alive = [number for number in answers if number != EIO]
    found = edge(ran([*alive, *[EIO] * more], more + 1), EIO)
    assert not found.lost


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        ([0, 0, EIO, EIO], 2),  # the last answer was overwritten
        ([0, EIO, 0, EIO], 2),  # and so was the first EIO
        ([EIO, 0, 0, 0], 2),
    ],
)
def test_what_was_overwritten_is_lost(answers: list[int], kept: int) -> None:
    assert edge(ran(answers, kept), EIO).lost


def test_of_a_thread_that_did_nothing_nothing_is_lost() -> None:
    assert edge(ran([], 8), EIO) == Edge(None, None, lost=False)


def test_bytes_that_only_look_like_the_errno_are_not_it() -> None:
    found = edge(ran([ODD, ODD, 0, EIO], 8), EIO)
    assert found.first is not None and found.first.began == 130
    assert all(one < other for one, other in pairwise([found.other.began if found.other else 0, found.first.began]))
