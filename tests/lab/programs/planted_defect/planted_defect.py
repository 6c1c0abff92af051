# SPDX-License-Identifier: Apache-2.0
"""A fault that plants a defect in the kernel, by the module beside it; docs/own-faults.md says how it comes to the lab.

The package carries the module with it: `modules.json` has it for each kernel, by its release, packed by zlib and in
base64.
"""

import base64
import json
import os
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from chaos.errors import Unsupported
from chaos.fault import Evidence, Fault, FaultContext, Target

TOLD = Path("/proc/planted")
KCSAN = Path("/sys/kernel/debug/kcsan")
MODULES = Path(__file__).with_name("modules.json")


@dataclass(kw_only=True)
class Plant(Fault):
    """Plant a defect in the kernel's SEV code. It is there before the run's first look at the host, and stays.

    So it can neither be withheld nor undone.
    """

    TARGET: ClassVar[Target] = "host"
    NEEDS: ClassVar[str] = "a lab, whose kernel is not to be used for anything else"
    PROOF: ClassVar[str] = "the module counts how often the kernel did there what a stock one would not have done"
    LETS_GO: ClassVar[bool] = False
    DISTURBS: ClassVar[bool] = False  # what a kernel with the defect answers is its answer

    defect: str

    def require(self, ctx: FaultContext, target: str) -> None:
        """Asked before the run fills the host, which is when what was there all along has to be there."""
        if not TOLD.exists():
            module = Path("/tmp/planted.ko")
            module.write_bytes(zlib.decompress(base64.b64decode(json.loads(MODULES.read_text())[os.uname().release])))
            subprocess.run(["insmod", module], check=True, timeout=60)
            for function in ("read_it", "write_it") if KCSAN.exists() else ():
                KCSAN.write_text(f"!{function}")  # it tells of races in the code under test alone
        try:
            TOLD.write_text(self.defect)
        except OSError as error:
            raise Unsupported(f"this kernel cannot have {self.defect}: {error.strerror}") from error

    def apply(self, ctx: FaultContext, target: str) -> None:
        pass

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        line = next(line for line in TOLD.read_text().splitlines() if line.startswith(f"{self.defect} "))
        return Evidence(True if not line.endswith(" activated=0") else None, line)

    def undo(self, ctx: FaultContext, target: str) -> str:
        return f"{self.defect} stays until the lab ends"
