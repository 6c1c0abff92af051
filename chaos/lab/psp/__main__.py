# SPDX-License-Identifier: Apache-2.0
"""`python -m chaos.lab.psp`: see `chaos.lab.psp.process`."""

import sys

from chaos.lab.psp.process import main

sys.exit(main())
