# SPDX-License-Identifier: Apache-2.0
"""Fill the cache: the kernels that everything is tested with (or those named), their modules, and busybox.

Exits 0, or 69 with what is lacking.
"""

from __future__ import annotations

import sys

from chaos.errors import SevchaosError
from chaos.lab.kernel.find import build_modules, default_kernels, find_busybox, find_kernel


def say(message: str) -> None:
    print(f"setup: {message}", file=sys.stderr, flush=True)


def main() -> int:
    try:
        find_busybox(say=say)
        for source in sys.argv[1:] or default_kernels():
            build_modules(find_kernel(source, say=say), say=say)
    except SevchaosError as error:
        say(error.message)
        if error.remedy:
            say(f"  {error.remedy}")
        return 69
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
