# SPDX-License-Identifier: Apache-2.0
"""Be somebody else on this host: a SEV guest in a cgroup of its own lives, and a command is run beside it.

    foreign_guest.py COMMAND…

Prints what the guest's owner sees before and after as a JSON line: its charge, the status of its context, and the
command's exit code. The command's own output goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from chaos.kvm.sev import Platform, Sev
from chaos.kvm.system import System

CGROUP = Path("/sys/fs/cgroup/somebody")


def main(command: list[str]) -> int:
    CGROUP.mkdir()
    (CGROUP.parent / "cgroup.subtree_control").write_text("+misc")
    (CGROUP / "cgroup.procs").write_text(str(os.getpid()))
    vm = System.open().create_vm()
    sev = Sev(vm.fd.number, Platform.open().fd.number)
    sev.init()
    sev.launch_start(0)
    before = look(sev)
    done = subprocess.run(command, stdout=sys.stderr, check=False, preexec_fn=leave)
    print(json.dumps({"before": before, "after": look(sev), "code": done.returncode}))
    return 0


def leave() -> None:
    """The command is nobody's guest."""
    (CGROUP.parent / "cgroup.procs").write_text("0")


def look(sev: Sev) -> dict[str, object]:
    status = sev.guest_status()
    return {"charge": (CGROUP / "misc.current").read_text(), "handle": status.handle, "state": status.state}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
