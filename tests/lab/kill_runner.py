# SPDX-License-Identifier: Apache-2.0
"""Runs inside the lab: kills the runner in the middle of a run, in several ways, and says as JSON what it left.

The orders are the files named by the arguments: one that holds a move, one that migrates.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chaos.errors import HostLacks
from chaos.linux import tracefs
from chaos.netns.space import Namespace
from chaos.safety import claim
from chaos.safety.survey import Paths, hierarchy

ORDER, MIGRATION = (Path(argument).read_bytes() for argument in sys.argv[1:])
HELD = b'"type":"Held"'
# When a run is killed: as soon as a record with this in it was written.
MOMENTS = (b'"type":"Filled"', b'"f":"init"', HELD, b'"f":"close"', b'"label":"end"')
IN_MIGRATION = (b'"f":"receive_state"', b'"phase":"resume"')
WITHIN = 30.0
NAMESPACES = Path("/proc/sys/user/max_net_namespaces")


def started(until: bytes, order: bytes = ORDER) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "chaos.runner.main"]
    said = tempfile.TemporaryFile()  # noqa: SIM115 - it ends with the runner
    runner = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
    assert runner.stdin is not None and runner.stdout is not None
    runner.stdin.write(order)
    runner.stdin.flush()
    last = b""
    while until not in (line := runner.stdout.readline()):
        assert line, f"the run ended before {until!r}: {last!r}, {runner.wait()}, {said.seek(0), said.read()}"
        last = line
    return runner


def left() -> dict[str, Any]:
    """What there is of ours: cgroups, processes, charges, network namespaces, and in tracefs."""
    ours = Path("/sys/fs/cgroup/sevchaos")
    groups = [Path(path).name for path, _, _ in os.walk(ours)][1:]
    return {
        "groups": groups, "processes": processes(), "charges": charges(ours), "namespaces": namespaces(),
        "tracing": tracing(),
    }  # fmt: skip


def tracing() -> list[str]:
    instances = [path.name for path in (tracefs.ROOT / "instances").iterdir()]
    return instances + (tracefs.ROOT / "kprobe_events").read_text().splitlines()


def processes() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"chaos.runner.main" in path.read_bytes():
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


def namespaces() -> int:
    """1 if there is a network namespace besides the machine's own. If one is allowed, another cannot be made then."""
    before = NAMESPACES.read_text()
    NAMESPACES.write_text("1")
    try:
        Namespace.create().close()
    except HostLacks:
        return 1
    finally:
        NAMESPACES.write_text(before)
    return 0


def settled() -> dict[str, Any]:
    deadline = time.monotonic() + WITHIN
    while any((state := left()).values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return state


def killed(moment: bytes, order: bytes = ORDER) -> dict[str, Any]:
    runner = started(moment, order)
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
    spared = [str(path) for path in (*claim.clean(root), *tracefs.clean())]  # a live run is not cleaned away
    warden = int(Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split()[0])
    os.kill(warden, signal.SIGKILL)
    runner.kill()
    runner.wait()
    deadline = time.monotonic() + WITHIN
    while processes() and time.monotonic() < deadline:
        time.sleep(0.02)
    before = left()
    cleaned = [path.name for path in (*claim.clean(root), *tracefs.clean())]
    return {"spared": spared, "before": before, "cleaned": cleaned, "left": settled()}


json.dump(
    {
        "killed": {moment.decode(): killed(moment) for moment in MOMENTS},
        "migrating": {moment.decode(): killed(moment, MIGRATION) for moment in IN_MIGRATION},
        "asked": asked_to_end(),
        "unread": unread(),
        "both": killed_with_its_warden(),
    },
    sys.stdout,
)
