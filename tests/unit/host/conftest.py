# SPDX-License-Identifier: Apache-2.0
"""VMMs of a run that nobody records."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from chaos.cgroup.group import Cgroup
from chaos.linux.loop import Loop
from chaos.runner.operations import OperationLog
from chaos.runner.recorder import Recorder
from chaos.runner.vmms import VmmProcesses
from chaos.vmm.server import ForkServer


class Nowhere:
    """Stands in for a cgroup: who enters it stays where it is."""

    def open_procs(self) -> int:
        return os.open(os.devnull, os.O_WRONLY)


def nowhere() -> Cgroup:
    return Nowhere()  # type: ignore[return-value]


@pytest.fixture
def vmms() -> Iterator[VmmProcesses]:
    server = ForkServer()
    made = VmmProcesses(server, Loop(), OperationLog(Recorder(os.open(os.devnull, os.O_WRONLY))))
    yield made
    made.close()
    server.close()
