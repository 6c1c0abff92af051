# SPDX-License-Identifier: Apache-2.0
"""Runs inside the lab: kills the runner in the middle of a run, in several ways, and says as JSON what it left.

The order is the file named by the first argument.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from chaos import cleanup
from chaos.survey import Paths, hierarchy

ORDER = Path(sys.argv[1]).read_bytes()
HELD = b'"type":"Held"'
# When a run is killed: as soon as a record with this in it was written.
MOMENTS = (b'"type":"Filled"', b'"f":"init"', HELD, b'"f":"close"', b'"label":"end"')
WITHIN = 30.0


def started(until: bytes) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "chaos.runner"]
    runner = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert runner.stdin is not None and runner.stdout is not None
    runner.stdin.write(ORDER)
    runner.stdin.flush()
    while until not in (line := runner.stdout.readline()):
        assert line, f"the run ended before {until!r}"
    return runner


def left() -> dict[str, Any]:
    """What there is of ours: cgroups, processes, charges and the firmware's guests."""
    ours = Path("/sys/fs/cgroup/sevchaos")
    groups = [Path(path).name for path, _, _ in os.walk(ours)][1:]
    return {"groups": groups, "processes": processes(), "charges": charges(ours)}


def processes() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"chaos.runner" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def charges(ours: Path) -> int:
    """Of all cgroups of ours together; those removed but still charged are counted by their parent."""
    try:
        return sum(int(line.split()[1]) for line in (ours / "misc.current").read_text().splitlines())
    except FileNotFoundError:
        return 0


def settled() -> dict[str, Any]:
    deadline = time.monotonic() + WITHIN
    while any((state := left()).values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return state


def killed(moment: bytes) -> dict[str, Any]:
    runner = started(moment)
    runner.kill()
    runner.wait()
    return settled()


def asked_to_end() -> dict[str, Any]:
    runner = started(HELD)
    assert runner.stdout is not None
    runner.terminate()
    last = runner.stdout.read().splitlines()[-1]
    return {"code": runner.wait(), "end": json.loads(last), "left": settled()}


def unread() -> dict[str, Any]:
    runner = started(HELD)
    assert runner.stdout is not None
    runner.stdout.close()
    return {"code": runner.wait(), "left": settled()}


def killed_with_its_warden() -> dict[str, Any]:
    runner = started(HELD)
    root = hierarchy(Paths())
    spared = [str(path) for path in cleanup.clean(root)]  # a live run is not cleaned away
    warden = int(Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split()[0])
    os.kill(warden, signal.SIGKILL)
    runner.kill()
    runner.wait()
    deadline = time.monotonic() + WITHIN
    while processes() and time.monotonic() < deadline:
        time.sleep(0.02)
    before = left()
    cleaned = [path.name for path in cleanup.clean(root)]
    return {"spared": spared, "before": before, "cleaned": cleaned, "left": settled()}


json.dump(
    {
        "killed": {moment.decode(): killed(moment) for moment in MOMENTS},
        "asked": asked_to_end(),
        "unread": unread(),
        "both": killed_with_its_warden(),
    },
    sys.stdout,
)
