# SPDX-License-Identifier: Apache-2.0
"""Native loops and vCPU threads on a kernel: `programs/native_moves.py`, and whether what it saw makes sense."""

from __future__ import annotations

import bisect
import errno
import json
import subprocess
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import DEADLINE, command

pytestmark = pytest.mark.lab

PROGRAM = Path(__file__).parent / "programs" / "native_moves.py"


@cache
def _found(kernel: str) -> dict[str, Any]:
    argv = command("lab", "run", "--quiet", "--kernel", kernel, "--copy", str(PROGRAM), "--", "python3", PROGRAM.name)
    done = subprocess.run(argv, capture_output=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def found(kernel: str) -> dict[str, Any]:
    return _found(kernel)


def test_a_thread_alone_is_never_told_to_come_back(found: dict[str, Any]) -> None:
    assert found["storm"]["alone"] == {str(errno.EINVAL): 6000}


def test_a_storm_of_moves_ends_and_every_refusal_is_one_of_two(found: dict[str, Any]) -> None:
    counts = found["storm"]["counts"]
    assert [sum(count.values()) for count in counts] == [6000] * 3
    assert {int(number) for count in counts for number in count} <= {errno.EINVAL, errno.EBUSY}
    assert any(str(errno.EBUSY) in count for count in counts)


def test_each_threads_calls_follow_each_other(found: dict[str, Any]) -> None:
    for thread in range(3):
        calls = [call for call in found["storm"]["calls"] if call[0] == thread]
        assert [index for _, index, *_ in calls] == [0, 1, 2] * 2000
        assert all(began <= ended for _, _, began, ended, _ in calls)
        assert all(one[3] <= other[2] for one, other in pairwise(calls))


def test_who_was_told_to_come_back_met_another_at_one_of_the_two_vms(found: dict[str, Any]) -> None:
    """A move takes both VMs' flags, except one from itself, which is refused before. So behind each EBUSY there is a
    call of another thread, on one of the same VMs, at the same time: this holds the records' times to each other."""
    slack = found["storm"]["slack"]
    calls = {thread: [c for c in found["storm"]["calls"] if c[0] == thread] for thread in range(3)}
    begins = {thread: [c[2] for c in calls[thread]] for thread in range(3)}
    for thread, index, began, ended, number in found["storm"]["calls"]:
        if thread == index:
            assert number == errno.EINVAL
        if number != errno.EBUSY:
            continue
        rivals = [
            other
            for rival in {0, 1, 2} - {thread}
            for other in _around(calls[rival], begins[rival], began - slack, ended + slack)
            if other[0] != other[1] and {other[0], other[1]} & {thread, index}
        ]
        assert rivals, f"nobody was there when thread {thread} was refused between {began} and {ended}"


def _around(calls: list[list[int]], begins: list[int], first: int, last: int) -> list[list[int]]:
    """Calls of one thread that overlap with the time from `first` to `last`."""
    low = max(0, bisect.bisect_left(begins, first) - 1)
    return [call for call in calls[low : bisect.bisect_right(begins, last)] if call[3] >= first]


def test_of_two_that_reach_for_one_source_one_has_it(found: dict[str, Any]) -> None:
    for first, second in found["race"]["rounds"]:
        assert first.get("0", 0) + second.get("0", 0) == 1
        assert {int(number) for number in (*first, *second)} <= {0, errno.EBUSY, errno.EINVAL}


def test_what_the_kernel_wrote_is_kept_or_restored(found: dict[str, Any]) -> None:
    assert found["arguments"] == {"kept": [errno.E2BIG, 0, 0, 0], "reset": [errno.E2BIG] * 4}


def test_a_guest_is_stopped_with_whole_registers(found: dict[str, Any]) -> None:
    """The last tick is what the counter was then; it has gone on by less than what lies between two ticks."""
    for stop in found["hand_over"]["stops"]:
        before, ticks, after = stop["counts"]
        assert (stop["why"], stop["stale"]) == ("STOPPED", 0)
        assert before <= ticks <= after
        assert after > before
        if stop["every"]:
            assert ticks > before
            assert after - ticks < stop["every"]


def test_a_guest_goes_on_at_the_destination(found: dict[str, Any]) -> None:
    hand_over = found["hand_over"]
    assert hand_over["moved"] == {"0": 1}
    assert (hand_over["after"]["why"], hand_over["after"]["stale"]) == ("STOPPED", 0)
    before, ticks = hand_over["after"]["counts"]
    assert ticks > before == hand_over["stops"][-1]["counts"][2]
    assert hand_over["times"] == sorted(hand_over["times"])
    assert hand_over["times"][2] > hand_over["times"][0]
    assert hand_over["dead"] == "KVM_RUN: EIO"


def test_a_move_that_is_held_can_be_waited_for(found: dict[str, Any]) -> None:
    held = found["held"]
    assert "is in step 0 after 0 calls" in held["said"]
    assert (held["early"], held["still"], held["why"]) == (False, True, "STOPPED")
    assert held["moved"] == {"0": 1}


def test_the_last_tick_of_a_killed_vmm_can_be_read(found: dict[str, Any]) -> None:
    killed = found["killed"]
    assert killed["status"] == 9
    assert killed["exits"] > 100
    assert killed["ticks"] >= 4 * 100
    assert 0 < killed["ago"] < 60e9
