# SPDX-License-Identifier: Apache-2.0
"""Finding and building the native library."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.cache import entries
from chaos.errors import HostLacks, InternalError
from chaos.lab import image
from chaos.native import library


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEVCHAOS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in library.SOURCES:
        shutil.copy(library.HERE / name, folder)
    monkeypatch.setattr(library, "HERE", folder)
    return folder


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that nothing else is beside; delete it, and there is none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    real = shutil.which("cc")
    path = folder / "cc"
    path.write_text(f'#!/bin/sh\nPATH={os.environ["PATH"]} exec {real} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("chaos.cache.command._SBIN", ())
    return path


def names() -> list[str]:
    return [entry.name for entry in entries.entries() if entry.kind == "native"]


def test_it_is_built_once(compiler: Path) -> None:
    said: list[str] = []
    path = library.find(say=said.append)
    assert said == ["building the engine's native loops"]
    assert library.find(say=pytest.fail) == path
    assert names() == [path.name]
    assert not any(entry.leftover for entry in entries.entries())
    assert [entry.what for entry in entries.entries() if entry.kind == "native"] == [entries.KINDS["native"]]


def test_other_sources_and_other_compilers_have_their_own(sources: Path, compiler: Path) -> None:
    first = library.find()
    (sources / "loops.c").write_text((sources / "loops.c").read_text() + "\n")
    second = library.find()
    compiler.write_text(compiler.read_text() + "# another\n")
    assert len({first, second, library.find()}) == 3


def test_without_a_compiler_the_package_is_named(compiler: Path) -> None:
    compiler.unlink()
    with pytest.raises(HostLacks, match="cc is not installed; it is needed to build the engine's native") as caught:
        library.find()
    assert "gcc" in caught.value.remedy


def test_without_a_compiler_what_one_has_built_is_used(sources: Path, compiler: Path) -> None:
    built = library.find()
    compiler.unlink()
    assert library.find() == built
    (sources / "loops.c").write_text("")
    with pytest.raises(HostLacks):
        library.find()


def test_a_failed_build_shows_the_compilers_words(sources: Path, compiler: Path) -> None:
    (sources / "loops.c").write_text("#error of ours\n")
    with pytest.raises(HostLacks, match="#error of ours") as caught:
        library.find()
    assert "libc6-dev" in caught.value.remedy
    assert not any(not name.startswith(".") for name in os.listdir(entries.entry_path("native", "x").parent))  # noqa: PTH208


def test_what_a_killed_build_has_left_is_not_used(compiler: Path) -> None:
    built = library.find()
    whole = built.read_bytes()
    built.unlink()
    (entries.staging("native", built.name) / library.NAME).write_bytes(b"half")
    assert library.find().read_bytes() == whole


def test_one_beside_the_sources_comes_first(sources: Path, compiler: Path) -> None:
    beside = sources / library.NAME
    shutil.copy(library.find(), beside)
    assert library.find() == beside


def test_one_of_other_structures_is_refused(sources: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "SIZES", (1, 2, 3, 4, 5))
    with pytest.raises(InternalError, match="built from other sources"):
        library.load.__wrapped__()


def test_the_library_needs_nothing_but_the_c_library(compiler: Path) -> None:
    shown = subprocess.run(["/usr/bin/ldd", library.find()], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[0] for line in shown.splitlines()}
    assert {name.split(".")[0].rpartition("/")[2] for name in needed} <= {
        "linux-vdso",
        "libc",
        "ld-linux-x86-64",
        "libpthread",
    }


def test_the_labs_image_brings_it_along(compiler: Path) -> None:
    files = {name: path for path, name in image._own_files()}
    assert files[f"chaos/native/{library.NAME}"] == library.find()
    ctypes.CDLL(str(files[f"chaos/native/{library.NAME}"]))


def test_no_module_has_the_librarys_name() -> None:
    """Python would try to import it as one."""
    assert not (Path(library.__file__).parent / library.NAME).with_suffix(".py").exists()


def test_two_at_once_build_one(own_cache: Path) -> None:
    code = "from chaos.native import library; print(library.find())"
    together = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate(timeout=60)[0] for process in together}) == 1
    assert len(names()) == 1
