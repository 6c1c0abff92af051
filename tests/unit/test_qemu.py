# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from chaos.errors import HostLacks
from chaos.lab.qemu import find_qemu


def fake(folder: Path, banner: str, name: str = "qemu-system-x86_64") -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\ntest \"$1\" = --version && echo '{banner}'\n")
    program.chmod(0o755)
    return program


@pytest.fixture(autouse=True)
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEVCHAOS_QEMU", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "a"))


DEBIAN_10 = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)"


@pytest.mark.parametrize(
    ("banner", "version", "threads"),
    [
        (DEBIAN_10, (10, 0, 2), "multi"),
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", (7, 2, 22), "single"),
        ("QEMU emulator version 9.2.4 (qemu-9.2.4-1.fc42)", (9, 2, 4), "single"),
        ("QEMU emulator version 10.1.50 (v10.1.0-1-gdeadbeef)", (10, 1, 50), "multi"),
        ("QEMU emulator version 11.0", (11, 0, 0), "multi"),
    ],
)
def test_the_version_decides_about_threads(
    tmp_path: Path, banner: str, version: tuple[int, int, int], threads: str
) -> None:
    program = fake(tmp_path / "a", banner)
    found = find_qemu()
    assert (found.path, found.version, found.threads) == (program, version, threads)


def test_one_thread_is_said_and_several_are_not(tmp_path: Path) -> None:
    fake(tmp_path / "a", "QEMU emulator version 8.2.2 (Debian)")
    said: list[str] = []
    find_qemu(say=said.append)
    assert len(said) == 1
    assert "QEMU 8.2.2 is older than 10.0.0" in said[0]
    fake(tmp_path / "a", DEBIAN_10)
    find_qemu(say=pytest.fail)


def test_the_newest_on_path_is_taken_and_numbers_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path / "a", "QEMU emulator version 9.2.0")
    newer = fake(tmp_path / "b", "QEMU emulator version 10.0.2")
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert find_qemu().path == newer


def test_of_two_names_of_one_file_the_first_on_path_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fake(tmp_path / "a", DEBIAN_10)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert find_qemu().path == first


def test_the_users_own_is_taken_even_if_it_is_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path / "a", DEBIAN_10)
    own = fake(tmp_path / "own", "QEMU emulator version 7.2.0", name="my-qemu")
    monkeypatch.setenv("SEVCHAOS_QEMU", str(own))
    assert find_qemu().path == own


def test_none_names_the_package_and_the_variable() -> None:
    with pytest.raises(HostLacks, match="not installed") as caught:
        find_qemu()
    assert "qemu-system-x86" in caught.value.remedy
    assert "SEVCHAOS_QEMU" in caught.value.remedy


def test_a_wrong_variable_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path / "a", DEBIAN_10)
    monkeypatch.setenv("SEVCHAOS_QEMU", str(tmp_path / "nothing"))
    with pytest.raises(HostLacks, match="SEVCHAOS_QEMU names"):
        find_qemu()


def test_too_old_is_refused_with_both_versions(tmp_path: Path) -> None:
    fake(tmp_path / "a", "QEMU emulator version 7.1.0")
    with pytest.raises(HostLacks, match=r"is QEMU 7\.1\.0, and the lab needs 7\.2\.0 or later"):
        find_qemu()


def test_a_program_that_is_no_qemu_is_named(tmp_path: Path) -> None:
    program = fake(tmp_path / "a", "hello")
    with pytest.raises(HostLacks, match="does not tell a version: hello") as caught:
        find_qemu()
    assert str(program) in caught.value.message
