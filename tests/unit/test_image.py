# SPDX-License-Identifier: Apache-2.0
"""What the layers of the lab's root file system are made from: a change of any of it makes a new one."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from chaos.lab import image
from chaos.lab.kernel.find import LabKernel

LAB = Path(image.__file__).parent


def sources() -> list[str]:
    return [str(p.relative_to(LAB)) for p in sorted((LAB / "modules").rglob("*")) if p.is_file()] + ["guest/init"]


@pytest.mark.parametrize("changed", sources())
def test_a_changed_source_makes_a_new_system_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    copy = tmp_path / "lab"
    shutil.copytree(LAB / "modules", copy / "modules")
    shutil.copytree(LAB / "guest", copy / "guest")
    monkeypatch.setattr(image, "_own", lambda path: copy / path)
    kernel = cast(LabKernel, SimpleNamespace(identity="6.12.0_0123456789ab"))
    before = image._system_key(kernel)
    assert image._system_key(kernel) == before
    with (copy / changed).open("a") as source:
        source.write("\n")
    assert image._system_key(kernel) != before
