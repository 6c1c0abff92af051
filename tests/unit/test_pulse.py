# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from chaos.controller.pulse import NS, Pulse

# A lab that computes, or one that does nothing while somebody stops its controller.
STOPPED = """
import sys, time
from chaos.controller.pulse import Pulse
with Pulse(time.process_time if sys.argv[1] == "with us" else time.monotonic) as pulse:
    print("here", flush=True)
    sys.stdin.readline()
print(*((ended - began) // 1_000_000 for began, ended in pulse.stalls))
"""


@pytest.mark.parametrize(
    ("slept", "ran", "still"),
    [(14.0, 0.0, True), (14.0, 2.7, True), (14.0, 2.9, False), (1.9, 0.0, False), (2.0, 0.0, True)],
)
def test_the_machine_stood_still_if_neither_we_nor_the_lab_ran(slept: float, ran: float, still: bool) -> None:
    pulse = Pulse(lambda: 0.0)
    pulse.beat(5 * NS, round((5 + slept) * NS), ran)
    assert bool(pulse.stalls) is still


@pytest.mark.parametrize(("lab", "stalls"), [("with us", 1), ("going on", 0)])
def test_who_is_stopped_finds_out_and_sees_whether_the_lab_was(lab: str, stalls: int) -> None:
    argv = [sys.executable, "-c", STOPPED, lab]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.7)
        out, _ = process.communicate("\n", timeout=30)
    found = [int(word) for word in out.split()]
    assert len(found) == stalls
    assert all(2500 <= each <= 20_000 for each in found)
