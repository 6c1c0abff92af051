# SPDX-License-Identifier: Apache-2.0
"""The lab's own kernel modules, compiled with the real headers of both kernels."""

from __future__ import annotations

import pytest

from chaos.lab.kernel.build import SOURCES
from chaos.lab.kernel.find import build_module, default_kernels, find_kernel, module_warnings

pytestmark = pytest.mark.lab


@pytest.mark.parametrize("source", default_kernels())
@pytest.mark.parametrize("name", sorted(path.parent.name for path in SOURCES.glob("*/Kbuild")))
def test_it_builds_without_a_warning(source: str, name: str) -> None:
    kernel = find_kernel(source, say=print)
    module = build_module(kernel, name, say=print)
    assert module.read_bytes()[:4] == b"\x7fELF"
    assert f"vermagic={kernel.release} ".encode() in module.read_bytes()
    assert module_warnings(kernel, name) == []
