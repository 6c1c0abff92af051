# SPDX-License-Identifier: Apache-2.0
"""On a SEV host that hides something, as a container does, the answer is what is hidden: no 0, and no traceback."""

from __future__ import annotations

import json

import pytest

from chaos.errors import ExitCode
from tests.lab.conftest import Sevchaos
from tests.lab.programs import container

pytestmark = pytest.mark.lab


def test_what_a_container_hides_is_named(in_lab: Sevchaos) -> None:
    done = in_lab("python3", "container.py", options=("--copy", str(container.__file__)))
    assert done.returncode == 0, done.stderr.decode()
    said: dict[str, tuple[int, str]] = json.loads(done.stdout)
    assert not any("Traceback" in text for _, text in said.values())
    code, text = said["run"]
    assert code == ExitCode.HOST_LACKS
    assert "has no misc.capacity, so it is not the host's root but a container's" in text
    assert "what to do: run on the host, or give the container the host's cgroups" in text
    assert "ASIDs: no misc.capacity" in said["doctor"][1]
    assert (said["clean"][0], said["clean"][1].startswith("nothing can have been left here: ")) == (0, True)
    code, text = said["no kvm"]
    assert code == ExitCode.HOST_LACKS
    assert "/dev/kvm: No such file or directory" in text
