# SPDX-License-Identifier: Apache-2.0
from chaos.cli import main

main()
