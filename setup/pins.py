# SPDX-License-Identifier: Apache-2.0
"""Exit 0 if the virtual environment has exactly the versions that pyproject.toml pins, else 1 and say which not."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main() -> int:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wrong = []
    for pin in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        name, _, wanted = pin.partition("==")
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "nothing"
        if found != wanted:
            wrong.append(f"{name} {wanted} is pinned, {found} is installed")
    for line in wrong:
        print(f"setup: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
