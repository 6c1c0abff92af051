# SPDX-License-Identifier: Apache-2.0
"""Prints one JSON object a line, for every check: its name, how long it took, its figures or what went wrong.

The last line is about the kernel's log: what it holds that a kernel in order does not say.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from tests.lab.programs.kfault import faults, unload

LIMIT = int(os.environ.get("KFAULT_LIMIT", "60"))  # seconds for a check
_TROUBLE = re.compile(r"WARNING:|BUG:|Oops|general protection|Call Trace|blocked for more than|rcu.*stall|became less")


def run(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    began = time.monotonic()
    signal.alarm(LIMIT)
    try:
        result = {"figures": check(), "why": ""}
    except Exception:
        result = {"figures": {}, "why": traceback.format_exc()}
    finally:
        signal.alarm(0)
    return {"check": check.__name__, "seconds": round(time.monotonic() - began, 2), **result}


def quiet_kernel() -> dict[str, Any]:
    log = subprocess.run(["dmesg"], capture_output=True, check=True).stdout.decode(errors="replace").splitlines()
    trouble = [line for line in log if _TROUBLE.search(line)]
    assert not trouble, "\n".join(trouble)
    return {"lines": len(log)}


def _too_long(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"not done after {LIMIT} s")


def main(names: list[str]) -> None:
    faulthandler.enable()
    signal.signal(signal.SIGALRM, _too_long)
    unload.insmod()
    for check in (*faults.CHECKS, *unload.CHECKS, quiet_kernel):
        if not names or check.__name__ in names:
            print(json.dumps(run(check)), flush=True)


main(sys.argv[1:])
