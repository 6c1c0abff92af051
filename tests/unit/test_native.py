# SPDX-License-Identifier: Apache-2.0
"""Native loops and vCPU threads, on ioctls that every Linux has."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from chaos.errors import InternalError
from chaos.native import LoopProgram, LoopStep, NativeCall, NativeLoop, Ran, Why, loops, read
from chaos.native.board import Board, ran
from chaos.native.layout import RECORD

FIONREAD = 0x541B
NO_IOCTL = 0
WITHIN = 20.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.fixture
def refused(pipe: tuple[int, int]) -> LoopStep:
    return LoopStep(pipe[0], NO_IOCTL)


@pytest.fixture
def asked(pipe: tuple[int, int]) -> LoopStep:
    return LoopStep(pipe[0], FIONREAD, bytes(4))


def run(*programs: LoopProgram, ring: int = 1 << 10) -> tuple[Ran, ...]:
    return NativeLoop(programs, ring=ring).start().join(WITHIN).threads


# Blocking without privileges: who listens for a seccomp filter's notifications waits until there is one. The filter
# lets everything pass and is its thread's own, so it is gone with the thread.

_NEW_LISTENER = 8
_NOTIF_RECV = 0xC0502100


def _install_filter() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    allow = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))
    program = ctypes.create_string_buffer(struct.pack("H6xQ", 1, ctypes.addressof(allow)))
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    return int(libc.syscall(317, 1, _NEW_LISTENER, program))


@pytest.fixture
def blocking() -> Iterator[LoopStep]:
    found: list[int] = []
    installed, over = threading.Event(), threading.Event()

    def hold() -> None:
        found.append(_install_filter())
        installed.set()
        over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    installed.wait()
    try:
        if found[0] < 0:
            pytest.skip("seccomp filters are not allowed here")
        yield LoopStep(found[0], _NOTIF_RECV, bytes(80), reset=True)
    finally:
        over.set()
        thread.join()
        if found[0] >= 0:
            os.close(found[0])


# What is recorded


def test_each_call_is_counted_and_recorded(asked: LoopStep, refused: LoopStep) -> None:
    nowhere = LoopStep(-1, NO_IOCTL)
    (thread,) = run(LoopProgram((asked, refused, nowhere), rounds=50))
    assert (thread.calls, thread.why, thread.overwritten) == (150, Why.ROUNDS, 0)
    assert thread.errnos == {0: 50, errno.ENOTTY: 50, errno.EBADF: 50}
    expected = [(0, 0), (1, errno.ENOTTY), (2, errno.EBADF)] * 50
    assert [(call.index, call.errno) for call in thread] == expected
    assert thread.under_way is None


@pytest.mark.parametrize("counter", [True, False])
def test_times_are_the_clocks_and_never_go_back(
    refused: LoopStep, counter: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not counter:
        monkeypatch.setattr(loops, "_CLOCK_SOURCE", tmp_path / "none")
    before = time.monotonic_ns()
    (thread,) = run(LoopProgram((refused,), rounds=20_000), ring=1 << 15)
    after = time.monotonic_ns()
    calls = list(thread)
    assert len(calls) == 20_000
    assert all(call.began <= call.ended for call in calls)
    assert all(one.ended <= other.began for one, other in pairwise(calls))
    slack = thread.clock_error + 1000
    assert before <= thread.began <= calls[0].began + slack
    assert calls[-1].ended <= thread.ended + slack <= after + slack
    if not counter:
        assert thread.clock_error == 0


def test_a_ring_keeps_the_latest_calls(asked: LoopStep, refused: LoopStep) -> None:
    program = LoopProgram((asked, refused, asked), rounds=37)
    (thread,) = run(program, ring=64)
    assert (thread.calls, thread.overwritten) == (111, 47)
    assert [call.index for call in thread] == [number % 3 for number in range(47, 111)]
    assert sum(len(piece) for piece in thread.records) == 64 * struct.calcsize(RECORD)
    assert all(one.ended <= other.began for one, other in pairwise(thread))


@pytest.mark.parametrize(("rounds", "overwritten"), [(63, 0), (64, 0), (65, 1), (128, 64)])
def test_a_ring_that_is_just_full(refused: LoopStep, rounds: int, overwritten: int) -> None:
    (thread,) = run(LoopProgram((refused,), rounds=rounds), ring=64)
    assert thread.overwritten == overwritten
    assert len(list(thread)) == rounds - overwritten


def test_a_thread_can_be_nice(refused: LoopStep) -> None:
    running = NativeLoop((LoopProgram((refused,), rounds=None, nice=7), LoopProgram((refused,), rounds=None))).start()
    while not running.begun:
        running.wait(0.001)
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert [os.getpriority(os.PRIO_PROCESS, tid) for tid in running.tids] == [min(ours + 7, 19), ours]
    running.stop()
    running.join(WITHIN)


def test_without_a_ring_calls_are_counted_only(refused: LoopStep) -> None:
    (thread,) = run(LoopProgram((refused,), rounds=100), ring=0)
    assert (thread.calls, thread.errnos, thread.overwritten) == (100, {errno.ENOTTY: 100}, 100)
    assert list(thread) == []


def test_an_outcome_merges_its_threads_by_time(refused: LoopStep) -> None:
    program = LoopProgram((refused,), rounds=500)
    outcome = NativeLoop((program, program, program)).start().join(WITHIN)
    calls = list(outcome.calls())
    assert [len([call for call in calls if call.thread == index]) for index in range(3)] == [500] * 3
    assert all(one.began <= other.began for one, other in pairwise(calls))
    assert outcome.rate > 0
    assert outcome.ended == max(thread.ended for thread in outcome.threads)


def test_the_callers_bytes_are_not_written_to(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"four")
    argument = bytes(4)
    run(LoopProgram((LoopStep(pipe[0], FIONREAD, argument),), rounds=3))
    assert argument == bytes(4)


def test_a_number_is_passed_as_it_is(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"four")
    answer = ctypes.c_int32()
    run(LoopProgram((LoopStep(pipe[0], FIONREAD, ctypes.addressof(answer)),)))
    assert answer.value == 4


# Beginning together


def test_no_thread_begins_before_its_moment(refused: LoopStep) -> None:
    offsets = (0, 300_000, 700_000)
    running = NativeLoop(tuple(LoopProgram((refused,), offset=offset) for offset in offsets)).start()
    outcome = running.join(WITHIN)
    assert len(set(running.tids)) == 3
    for thread, offset in zip(outcome.threads, offsets, strict=True):
        (call,) = thread
        assert outcome.begin + offset <= thread.began <= call.began


def test_a_moment_can_be_given(refused: LoopStep) -> None:
    at = time.monotonic_ns() + 30_000_000
    running = NativeLoop((LoopProgram((refused,)),)).start(at=at)
    assert running.begin == at
    assert not running.wait(0)
    assert running.join(WITHIN).threads[0].began >= at


def test_a_moment_that_has_passed_is_now(refused: LoopStep) -> None:
    assert run(LoopProgram((refused,)))[0].calls == 1
    assert NativeLoop((LoopProgram((refused,)),)).start(at=1).join(WITHIN).threads[0].calls == 1


def test_a_thread_can_be_pinned(refused: LoopStep) -> None:
    cpu = max(os.sched_getaffinity(0))
    with NativeLoop((LoopProgram((refused,), rounds=None, cpu=cpu),)).start() as running:
        assert os.sched_getaffinity(running.tids[0]) == {cpu}


def test_a_cpu_that_is_not_there(refused: LoopStep) -> None:
    with pytest.raises(OSError, match="starting native threads") as caught:
        NativeLoop((LoopProgram((refused,)), LoopProgram((refused,), cpu=1023))).start()
    assert caught.value.errno == errno.EINVAL


# Ending


def test_a_loop_without_end_ends_when_stopped(refused: LoopStep) -> None:
    running = NativeLoop((LoopProgram((refused,), rounds=None),) * 2).start()
    while min(running.calls()) < 100:
        assert not running.wait(0.001)
    running.stop()
    for thread in running.join(WITHIN).threads:
        assert thread.why is Why.STOPPED
        assert thread.calls >= 100


def test_stopped_before_the_beginning_nothing_is_called(refused: LoopStep) -> None:
    running = NativeLoop((LoopProgram((refused,)),)).start(at=time.monotonic_ns() + 3600_000_000_000)
    running.stop()
    (thread,) = running.join(WITHIN).threads
    assert (thread.calls, thread.why, list(thread)) == (0, Why.STOPPED, [])


def test_an_errno_can_end_a_thread(asked: LoopStep, refused: LoopStep) -> None:
    ends = LoopProgram((asked, refused), rounds=None, ends_at=frozenset({errno.ENOTTY}))
    (thread,) = run(ends)
    assert (thread.calls, thread.why, thread.detail) == (2, Why.MET, errno.ENOTTY)
    (thread,) = run(replace(ends, ends_at=frozenset({0, errno.EIO})))
    assert (thread.calls, thread.why, thread.detail) == (1, Why.MET, 0)


@pytest.mark.parametrize(("more", "calls"), [(0, 2), (1, 3), (2, 4), (7, 9)])
def test_a_thread_can_go_on_for_a_while_after_an_errno(
    asked: LoopStep, refused: LoopStep, more: int, calls: int
) -> None:
    ends = LoopProgram((asked, refused), rounds=None, ends_at=frozenset({errno.ENOTTY}), more=more)
    (thread,) = run(ends)
    assert (thread.calls, thread.why, thread.detail) == (calls, Why.MET, errno.ENOTTY)


def test_one_thread_can_end_all(asked: LoopStep, refused: LoopStep) -> None:
    endless = LoopProgram((refused,), rounds=None)
    first = LoopProgram((asked,), rounds=None, offset=100_000, ends_at=frozenset({0}), ends_all=True)
    threads = run(endless, first, endless)
    assert [thread.why for thread in threads] == [Why.STOPPED, Why.MET, Why.STOPPED]


def test_a_join_has_a_deadline_and_says_what_it_waited_for(blocking: LoopStep, refused: LoopStep) -> None:
    running = NativeLoop((LoopProgram((refused,)), LoopProgram((refused, blocking)))).start()
    with pytest.raises(TimeoutError, match=rf"thread {running.tids[1]} is in step 1 after 1 calls"):
        running.join(0.05)
    running.stop()
    while not running.wait(0.01):
        running.interrupt()
    done, interrupted = running.join(WITHIN).threads
    assert done.why is Why.ROUNDS
    assert [call.errno for call in interrupted] == [errno.ENOTTY, errno.EINTR]


def test_python_keeps_its_signals(blocking: LoopStep) -> None:
    came = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.set())
    try:
        running = NativeLoop((LoopProgram((blocking,), rounds=None),)).start()
        while not running._crew.boards[0].report().since:  # until it has made its call
            running.wait(0.001)
        for _ in range(20):
            came.clear()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert came.wait(WITHIN)
        assert running.calls() == (0,)
        running.stop()
        while not running.wait(0.01):
            running.interrupt()
        assert running.join(WITHIN).threads[0].errnos == {errno.EINTR: 1}
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_nothing_is_freed_under_a_running_thread(refused: LoopStep) -> None:
    with NativeLoop((LoopProgram((refused,), rounds=None),)).start() as running:
        with pytest.raises(InternalError, match="while they ran"):
            running._crew._free()
        with pytest.raises(TimeoutError):
            running.join(0)


def test_nothing_is_left_open(refused: LoopStep) -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names
    running = NativeLoop((LoopProgram((refused,), rounds=10),)).start()
    outcome = running.join(WITHIN)
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert running.calls() == (10,)
    assert running.join(0) == outcome


def test_many_at_once_and_one_after_another(refused: LoopStep) -> None:
    for _ in range(20):
        programs = tuple(LoopProgram((refused,), rounds=20, offset=1000 * number) for number in range(16))
        assert [thread.calls for thread in run(*programs, ring=16)] == [20] * 16


# Killed

CHILD = """
    import sys
    from chaos.native import LoopProgram, LoopStep, NativeLoop
    fd, memory, request = map(int, sys.argv[1:4])
    size = int(sys.argv[4])
    step = LoopStep(fd, request, bytes(size) or 0, reset=size > 0)
    programs = (LoopProgram((LoopStep(fd, 0), step), rounds=None),) * 2
    running = NativeLoop(programs, ring=256).start(memory=memory)
    print(*running.tids, flush=True)
    running.wait(60)
"""


def kill_in_loop(step: LoopStep, calls: int) -> tuple[list[int], tuple[Ran, ...]]:
    """Kill a process in which two threads have made so many calls; what can be read afterwards."""
    shape = NativeLoop((LoopProgram((LoopStep(0, 0),)),) * 2, ring=256)
    with shape.memory() as memory:
        size = len(step.argument) if isinstance(step.argument, bytes) else 0
        arguments = (step.fd, memory.number, step.request, size)
        argv = [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, arguments)]
        with subprocess.Popen(
            argv, pass_fds=(step.fd, memory.number), stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        ) as process:
            assert process.stdout is not None
            tids = [int(word) for word in process.stdout.readline().split()]
            while min(thread.calls for thread in read(memory.number)) < calls:
                assert process.poll() is None
            process.kill()
        return tids, read(memory.number)


def test_the_calls_of_a_killed_process_can_be_read(refused: LoopStep) -> None:
    tids, threads = kill_in_loop(refused, 1000)
    assert [thread.tid for thread in threads] == tids
    for thread in threads:
        calls = list(thread)
        assert thread.why is Why.UNDER_WAY
        assert len(calls) == 255  # one place may have been half written
        assert thread.overwritten + len(calls) == thread.calls
        assert {call.errno for call in calls} == {errno.ENOTTY}
        assert all(one.began <= one.ended <= other.began for one, other in pairwise(calls))
        assert all({one.index, other.index} == {0, 1} for one, other in pairwise(calls))


def test_the_call_that_a_killed_process_was_in_is_told(blocking: LoopStep) -> None:
    _, threads = kill_in_loop(blocking, 1)
    for number, thread in enumerate(threads):
        (call,) = thread
        assert thread.under_way is not None
        assert (thread.under_way.thread, thread.under_way.index) == (number, 1)
        assert call.ended <= thread.under_way.began


def test_a_memory_file_is_for_one_start(refused: LoopStep) -> None:
    loop = NativeLoop((LoopProgram((refused,)),), ring=64)
    with loop.memory() as memory:
        (joined,) = loop.start(memory=memory.number).join(WITHIN).threads
        (again,) = read(memory.number)
        assert list(again) == list(joined)
        with pytest.raises(InternalError, match="used before"):
            loop.start(memory=memory.number)
    with replace(loop, ring=1 << 10).memory() as other, pytest.raises(InternalError, match="memory file has"):
        loop.start(memory=other.number)


# A board, by hand


def board_of(calls: int, ring: int, since: int, ended: list[int]) -> Ran:
    import mmap

    from chaos.native.layout import CallRecord, Head, Report

    memory = mmap.mmap(-1, ctypes.sizeof(Head) + ring * ctypes.sizeof(CallRecord))
    Report.from_buffer(memory).__init__(began=5, calls=calls, since=since, ring=ring, call=3)  # type: ignore[misc]
    records = (CallRecord * ring).from_buffer(memory, ctypes.sizeof(Head))
    for place, time_ended in enumerate(ended):
        records[place] = CallRecord(began=time_ended - 10, ended=time_ended, call=place)
    return ran(0, Board(memory, 0))


@pytest.mark.parametrize(
    ("calls", "since", "ended", "began"),
    [
        (0, 0, [], None),  # not begun
        (0, 10, [], 10),  # in the first call
        (1, 10, [20], None),  # between two calls: the time is still that of the one before
        (1, 20, [20], 20),
        (3, 25, [20, 30, 40], None),
        (3, 40, [20, 30, 40], 40),
        (4, 50, [20, 30, 40, 50], 50),
        (5, 60, [60, 30, 40, 50], 60),
    ],
)
def test_whether_a_call_was_under_way(calls: int, since: int, ended: list[int], began: int | None) -> None:
    thread = board_of(calls, 4, since, ended)
    assert (thread.under_way.began if thread.under_way else None) == began
    assert [call.ended for call in thread] == sorted(ended)[-min(calls, 3) :][: min(calls, 3)]


# Programs that make no sense


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": ()},
        {"rounds": 0},
        {"offset": -1},
        {"cpu": -1},
        {"cpu": 1024},
        {"ends_at": frozenset({4096})},
        {"ends_at": frozenset({-1})},
        {"more": -1},
        {"nice": -1},
        {"nice": 20},
    ],
)
def test_a_program_is_checked(arguments: dict[str, object]) -> None:
    sound: dict[str, object] = {"steps": (LoopStep(0, 0),)}
    with pytest.raises(InternalError):
        LoopProgram(**(sound | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("ring", [-1, 3, 100, 1 << 25])
def test_a_ring_is_a_power_of_two(ring: int) -> None:
    with pytest.raises(InternalError, match="power of two"):
        NativeLoop((LoopProgram((LoopStep(0, 0),)),), ring=ring)


def test_a_loop_has_programs() -> None:
    with pytest.raises(InternalError):
        NativeLoop(())


@pytest.mark.parametrize("arguments", [{"argument": b""}, {"argument": 7, "reset": True}])
def test_a_step_has_bytes_to_restore(arguments: dict[str, object]) -> None:
    with pytest.raises(InternalError):
        LoopStep(0, 0, **arguments)  # type: ignore[arg-type]


def test_a_call_is_a_value() -> None:
    call = NativeCall(thread=0, index=1, began=2, ended=3, errno=0)
    assert call == NativeCall(0, 1, 2, 3, 0)
    assert len({call, replace(call, errno=5)}) == 2


def test_a_process_may_end_in_the_middle(pipe: tuple[int, int]) -> None:
    code = f"""
        from chaos.native import LoopProgram, LoopStep, NativeLoop
        running = NativeLoop((LoopProgram((LoopStep({pipe[0]}, 0),), rounds=None),) * 4).start()
        while min(running.calls()) < 100:
            running.wait(0.001)
    """
    argv = [sys.executable, "-X", "dev", "-c", textwrap.dedent(code)]
    done = subprocess.run(argv, pass_fds=[pipe[0]], capture_output=True, timeout=WITHIN * 3, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
