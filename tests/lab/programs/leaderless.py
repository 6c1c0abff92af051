# SPDX-License-Identifier: Apache-2.0
"""What is left in a cgroup whose owner is gone: processes whose first thread has ended, one of which came only then.

Prints for each whether cgroup.kill ended it within some seconds, and whether the cgroup was removed by `clean`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from chaos.cgroup.group import Cgroup
from chaos.safety import claim
from chaos.safety.survey import Paths, hierarchy

SECONDS = 20.0
KILLED_WITHIN = 2.0
LIVE_ON = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).syscall(60, 0)
"""


def leaderless(group: Cgroup, *, born: bool) -> subprocess.Popen[bytes]:
    """A process of this cgroup whose first thread has ended, before it came or since."""
    procs = group.open_procs()
    enter = f"import os; os.write({procs}, b'0'); " if born else ""
    child = subprocess.Popen([sys.executable, "-c", f"{enter}exec({LIVE_ON!r})"], pass_fds=[procs])
    stat = Path(f"/proc/{child.pid}/stat")
    deadline = time.monotonic() + SECONDS
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if not born:
        group.admit(child.pid)
    return child


def main() -> None:
    root = hierarchy(Paths())
    for born in (True, False):
        claimed = claim.claim(root, "left")
        inner = claimed.cgroup.create("source")
        child = leaderless(inner, born=born)
        claimed.cgroup.kill()
        try:
            child.wait(KILLED_WITHIN)
            said = "ended"
        except subprocess.TimeoutExpired:
            said = "lives"
        claimed._lock.close()  # as the death of its owner does
        claim.clean(root)
        print(said, child.wait(SECONDS), claimed.cgroup.exists)


if __name__ == "__main__":
    main()
