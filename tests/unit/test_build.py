# SPDX-License-Identifier: Apache-2.0
"""Building modules, with headers that copy instead of compiling."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chaos.cache import entries
from chaos.errors import HostLacks, InternalError
from chaos.lab.kernel import build
from chaos.lab.kernel.find import LabKernel, build_module, module_warnings

MAKEFILE = """
modules:
\tgrep -q 'obj-m := shim.o' $(M)/Kbuild
\ttest -z "$(CONFIG_DEBUG_INFO_BTF_MODULES)"
\ttest ! -e $(M)/shim.o
\techo "compiled by $(CC)"
\techo "warning: the compiler differs from the one used to build the kernel"
\t@sed -n 's/^#warning/shim.c:1: warning:/p' $(M)/shim.c
\t! grep error $(M)/shim.c
\tcp $(M)/shim.c $(M)/shim.ko
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of one module."""
    folder = tmp_path / "sources" / "shim"
    folder.mkdir(parents=True)
    (folder / "Kbuild").write_text("obj-m := shim.o\n")
    (folder / "shim.c").write_text("int shim;\n")
    monkeypatch.setattr(build, "SOURCES", folder.parent)
    monkeypatch.setenv("SEVCHAOS_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def kernel(tmp_path: Path) -> LabKernel:
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "Makefile").write_text(MAKEFILE)
    (headers / ".config").write_text("CONFIG_MODULES=y\n")
    return LabKernel("debian:6.1", "6.1.0", "6.1.0", tmp_path, tmp_path, headers, "0123456789abcdef")


def log(module: Path) -> str:
    return module.with_suffix(".log").read_text()


def test_a_module_is_built_once(sources: Path, kernel: LabKernel) -> None:
    said: list[str] = []
    module = build_module(kernel, "shim", say=said.append)
    assert module.read_text() == "int shim;\n"
    assert said == ["building the kernel module shim for 6.1.0_0123456789ab"]
    assert build_module(kernel, "shim", say=pytest.fail) == module
    assert not any(entry.leftover for entry in entries.entries())


@pytest.mark.parametrize("changed", ["shim.c", "shim.h", "Kbuild"])
def test_changed_sources_are_built_again(sources: Path, kernel: LabKernel, changed: str) -> None:
    before = build_module(kernel, "shim")
    (sources / changed).write_text("obj-m := shim.o #other\n")
    assert build_module(kernel, "shim") != before


def test_another_kernel_gets_its_own(sources: Path, kernel: LabKernel, tmp_path: Path) -> None:
    other = LabKernel("debian:6.1", "6.1.0", "6.1.0", tmp_path, tmp_path, kernel.build, "fedcba9876543210")
    assert build_module(kernel, "shim") != build_module(other, "shim")


def test_a_failed_build_shows_the_compilers_words_and_leaves_nothing_to_be_used(
    sources: Path, kernel: LabKernel
) -> None:
    (sources / "shim.c").write_text("error: here\n")
    with pytest.raises(HostLacks, match="error: here"):
        build_module(kernel, "shim")
    with pytest.raises(HostLacks, match="error: here"):
        build_module(kernel, "shim")


def test_what_a_killed_build_has_left_is_not_used(sources: Path, kernel: LabKernel) -> None:
    rest = entries.staging("modules", "6.1.0_0123456789ab")
    (rest / "shim.o").write_text("half")
    assert build_module(kernel, "shim").read_text() == "int shim;\n"


def test_warnings_are_found_but_for_the_compilers_difference(sources: Path, kernel: LabKernel) -> None:
    assert module_warnings(kernel, "shim") == []
    (sources / "shim.c").write_text("#warning unused\n")
    assert module_warnings(kernel, "shim") == ["shim.c:1: warning: unused"]


def test_an_unknown_module_is_a_bug_of_ours(sources: Path, kernel: LabKernel) -> None:
    with pytest.raises(InternalError, match="nosuch"):
        build_module(kernel, "nosuch")


def test_without_make_the_package_is_named(
    sources: Path, kernel: LabKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostLacks, match="make is not installed") as caught:
        build_module(kernel, "shim")
    assert "apt-get install make" in caught.value.remedy


@pytest.mark.parametrize(
    ("demanded", "there", "chosen"),
    [
        ("CC = $(if $(X),$(CCACHE)) $(CROSS_COMPILE)gcc-12\n", ["gcc-12", "gcc"], []),
        ("CC = $(if $(X),$(CCACHE)) $(CROSS_COMPILE)gcc-12\n", ["gcc"], ["CC=gcc"]),
        (
            "CC = $(CROSS_COMPILE)gcc-12\noverride CROSS_COMPILE = x86_64-linux-gnu-\n",
            ["x86_64-linux-gnu-gcc-12"],
            [],
        ),
        ("CC = $(CROSS_COMPILE)gcc-12\noverride CROSS_COMPILE = x86_64-linux-gnu-\n", ["gcc"], ["CC=gcc"]),
    ],
)
def test_the_compiler_that_headers_demand_or_the_one_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demanded: str, there: list[str], chosen: list[str]
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in (*there, "ld"):
        (programs / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(programs))
    (tmp_path / ".kernelvariables").write_text(demanded)
    assert build._compiler(tmp_path, {}) == chosen


def test_a_kernel_that_clang_built_wants_clang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(HostLacks, match="clang is not installed"):
        build._compiler(tmp_path, {"CC_IS_CLANG": "y"})
    (programs / "clang").touch(mode=0o755)
    assert build._compiler(tmp_path, {"CC_IS_CLANG": "y"}) == ["LLVM=1"]


def test_the_callers_make_does_not_reach_in(sources: Path, kernel: LabKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKEFLAGS", "n -- CONFIG_DEBUG_INFO_BTF_MODULES=y")  # -n would build nothing
    assert build_module(kernel, "shim").is_file()
    assert os.environ["MAKEFLAGS"].startswith("n")
