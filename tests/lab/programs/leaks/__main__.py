# SPDX-License-Identifier: Apache-2.0
"""See the package. What was found is printed as JSON, progress goes to stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.lab.programs.leaks.kills import campaign
from tests.lab.programs.leaks.plant import planted


def main() -> None:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("plant")
    kill = verbs.add_parser("kill")
    kill.add_argument("--runs", type=int, required=True)
    kill.add_argument("--kills", type=int, required=True)
    kill.add_argument("--seed", type=int, required=True)
    kill.add_argument("--minutes", type=float, default=600.0)
    kill.add_argument("names", nargs="+")
    given = parser.parse_args()
    said = planted(Path.cwd()) if given.verb == "plant" else killed(given)
    json.dump(said, sys.stdout)


def killed(given: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    done = campaign(given.names, given.runs, given.kills, given.seed, given.minutes, sys.stderr)
    return {
        "runs": done.runs, "killed": done.killed, "lost": done.lost, "outcomes": done.outcomes, "codes": done.codes,
        "leaks": done.leaks, "seconds": round(time.monotonic() - began),
    }  # fmt: skip


if __name__ == "__main__":
    main()
