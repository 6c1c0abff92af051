# SPDX-License-Identifier: Apache-2.0
from chaos.lab.guest.agent import main

main()
