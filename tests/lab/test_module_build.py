# SPDX-License-Identifier: Apache-2.0
"""The lab's own kernel modules, compiled with the real headers of every kernel that is tested with."""

from __future__ import annotations

import pytest

from chaos.lab.kernel.build import SOURCES
from chaos.lab.kernel.find import build_module, find_kernel, module_warnings

pytestmark = pytest.mark.lab


@pytest.mark.parametrize("name", sorted(path.parent.name for path in SOURCES.glob("*/Kbuild")))
def test_it_builds_without_a_warning(kernel: str, name: str) -> None:
    found = find_kernel(kernel, say=print)
    module = build_module(found, name, say=print)
    assert module.read_bytes()[:4] == b"\x7fELF"
    assert f"vermagic={found.release} ".encode() in module.read_bytes()
    assert module_warnings(found, name) == []
