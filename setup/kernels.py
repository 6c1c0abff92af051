# SPDX-License-Identifier: Apache-2.0
"""Fill the cache: the kernels that everything is tested with (or those named), their modules, and busybox.

Exits 0; 75 when fetching apt's package lists may help; 69 otherwise.
"""

from __future__ import annotations

import sys

from chaos.errors import NoKernel, NoSpace, SevchaosError
from chaos.lab.kernel.build import SOURCES
from chaos.lab.kernel.find import build_module, default_kernels, find_busybox, find_kernel


def say(message: str) -> None:
    print(f"setup: {message}", file=sys.stderr, flush=True)


def main() -> int:
    try:
        find_busybox(say=say)
        for source in sys.argv[1:] or default_kernels():
            kernel = find_kernel(source, say=say)
            for module in sorted(SOURCES.glob("*.c")):
                build_module(kernel, module.stem, say=say)
    except SevchaosError as error:
        say(error.message)
        if error.remedy:
            say(f"  {error.remedy}")
        return 75 if isinstance(error, NoKernel) and not isinstance(error, NoSpace) else 69
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
