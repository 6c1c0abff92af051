# SPDX-License-Identifier: Apache-2.0
"""What KCSAN is told to report."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.linux import kcsan, modules

KALLSYMS = """\
ffffffff81000000 T misc_cg_try_charge
ffffffff81000100 t misc_cg_alloc.cold
ffffffff81000200 d misc_cgrp_subsys
ffffffff81000300 T commit_creds
ffffffffc0000000 t sev_vm_move_enc_context_from\t[kvm_amd]
ffffffffc0000100 r __func__.0\t[kvm_amd]
ffffffffc0100000 t __sev_do_cmd_locked\t[ccp]
ffffffffc0200000 t misc_of_another\t[another]
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """/proc and /sys of a kernel with KCSAN, in one folder. What is written to its control is kept as it was last."""
    (tmp_path / "kernel/debug").mkdir(parents=True)
    (tmp_path / "kernel/debug/kcsan").touch()
    (tmp_path / "module/kcsan/parameters").mkdir(parents=True)
    (tmp_path / "kallsyms").write_text(KALLSYMS)
    return tmp_path


def test_it_is_aimed_at_the_drivers_and_the_misc_controller(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []
    write = Path.write_text

    def keep(path: Path, text: str) -> int:
        said.append((path.name, text))
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", keep)
    assert kcsan.aim(sys=kernel, proc=kernel) == 4
    named = ("__sev_do_cmd_locked", "misc_cg_alloc.cold", "misc_cg_try_charge", "sev_vm_move_enc_context_from")
    assert said == [*(("kcsan", f"!{name}") for name in named), ("kcsan", "whitelist"), ("skip_watch", "100")]


def test_a_kernel_without_it_is_not_touched(tmp_path: Path) -> None:
    assert kcsan.aim(sys=tmp_path, proc=tmp_path) == 0


def test_drivers_that_were_loaded_anew_have_other_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(modules, "call", lambda *argv, **_: done.append(argv))
    monkeypatch.setattr(kcsan, "aim", lambda: done.append("aimed"))
    modules.reload(("kvm_amd", "ccp"), {})
    assert done[-2:] == [("modprobe", "kvm_amd"), "aimed"]
