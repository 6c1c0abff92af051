# SPDX-License-Identifier: Apache-2.0
"""Installed kernels and build trees: small ones, made of files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from chaos.cache import entries
from chaos.errors import HostLacks, NoKernel
from chaos.lab.kernel.find import find_kernel
from tests.unit.fake_debian import CONFIG, DEPMOD

RELEASE = "6.13.0-rc3-mine+"

# Does what the kernel's own modules_install does, as far as anybody can see from outside.
MAKEFILE = """
modules_install:
\ttest "$(DEPMOD)" = true
\tmkdir -p $(INSTALL_MOD_PATH)/lib/modules/RELEASE/kernel
\tcp kvm-amd.ko $(INSTALL_MOD_PATH)/lib/modules/RELEASE/kernel/
\tln -s $(CURDIR) $(INSTALL_MOD_PATH)/lib/modules/RELEASE/build
\ttest ! -e fail
""".replace("RELEASE", RELEASE)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEVCHAOS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "depmod").write_text(DEPMOD)
    (tmp_path / "bin" / "depmod").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


def later(path: Path, content: str) -> None:
    """Write a file as a rebuild does: its time moves, whatever the clock's resolution is."""
    before = path.stat().st_mtime_ns
    path.write_text(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


# Installed


@pytest.fixture
def system(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    modules = root / "lib" / "modules" / RELEASE
    headers = root / "usr" / "src" / "headers"
    for folder in (root / "boot", modules / "kernel", headers):
        folder.mkdir(parents=True)
    (root / "boot" / f"vmlinuz-{RELEASE}").write_text("image")
    (root / "boot" / f"config-{RELEASE}").write_text(CONFIG.format(version="6.13.0-rc3"))
    (modules / "modules.dep").write_text("kernel/kvm-amd.ko:\n")
    (modules / "kernel" / "kvm-amd.ko").write_text("module")
    (modules / "build").symlink_to(headers)
    (headers / "Makefile").write_text("all:\n")
    (headers / ".config").write_text(CONFIG.format(version="6.13.0-rc3"))
    (headers / "Module.symvers").write_text("symbols")
    return root


def test_an_installed_kernel_by_its_release(system: Path) -> None:
    kernel = find_kernel(f"installed:{RELEASE}", system=system)
    assert (kernel.release, kernel.version) == (RELEASE, "6.13.0")
    assert kernel.image.read_text() == "image"
    assert (kernel.modules / "modules.dep").is_file()
    assert (kernel.build / "Makefile").is_file()


def test_the_running_one(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: RELEASE)
    kernel = find_kernel("running", system=system)
    assert (kernel.source, kernel.release) == ("running", RELEASE)


def test_the_version_is_the_configurations_where_the_release_has_only_an_abi(system: Path) -> None:
    (system / "boot" / f"config-{RELEASE}").write_text(CONFIG.format(version="6.8.12"))
    assert find_kernel(f"installed:{RELEASE}", system=system).version == "6.8.12"


def test_image_and_configuration_may_lie_beside_the_modules(system: Path) -> None:
    modules = system / "lib" / "modules" / RELEASE
    shutil.move(system / "boot" / f"vmlinuz-{RELEASE}", modules / "vmlinuz")
    shutil.move(system / "boot" / f"config-{RELEASE}", modules / "config")
    assert find_kernel(f"installed:{RELEASE}", system=system).image == modules / "vmlinuz"


@pytest.mark.parametrize(
    ("missing", "word", "remedy"),
    [
        (f"lib/modules/{RELEASE}", "there are no modules of", "install the kernel"),
        (f"boot/vmlinuz-{RELEASE}", "no image of", "install the kernel's image"),
        ("usr/src/headers", "there are no headers of", f"linux-headers-{RELEASE}"),
    ],
)
def test_what_is_missing_of_an_installed_kernel_is_named(system: Path, missing: str, word: str, remedy: str) -> None:
    shutil.rmtree(system / missing) if (system / missing).is_dir() else (system / missing).unlink()
    with pytest.raises(NoKernel, match=word) as caught:
        find_kernel(f"installed:{RELEASE}", system=system)
    assert remedy in caught.value.remedy


def test_a_wrong_release_names_those_that_are_there(system: Path) -> None:
    with pytest.raises(NoKernel) as caught:
        find_kernel("installed:5.4.0", system=system)
    assert f"installed:{RELEASE}" in caught.value.remedy


@pytest.mark.parametrize(
    "changed",
    [
        f"boot/vmlinuz-{RELEASE}",
        f"lib/modules/{RELEASE}/kernel/kvm-amd.ko",
        "usr/src/headers/Module.symvers",
        "usr/src/headers/.config",
    ],
)
def test_the_identity_follows_every_part(system: Path, changed: str) -> None:
    def identity() -> str:
        return find_kernel(f"installed:{RELEASE}", system=system).identity

    before = identity()
    assert identity() == before
    path = system / changed
    later(path, path.read_text())  # the same bytes: built again, which is what counts
    assert identity() != before


# Build trees


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "linux"
    for folder in ("arch/x86/boot", "include/config"):
        (tree / folder).mkdir(parents=True)
    (tree / "arch/x86/boot/bzImage").write_text("image")
    (tree / "include/config/kernel.release").write_text(f"{RELEASE}\n")
    (tree / ".config").write_text(CONFIG.format(version="6.13.0-rc3"))
    (tree / "Module.symvers").write_text("symbols")
    (tree / "modules.order").write_text("kvm-amd.o\n")
    (tree / "kvm-amd.ko").write_text("module")
    (tree / "Makefile").write_text(MAKEFILE)
    return tree


def test_a_build_tree(tree: Path) -> None:
    said: list[str] = []
    kernel = find_kernel(str(tree), say=said.append)
    assert (kernel.release, kernel.version) == (RELEASE, "6.13.0")
    assert kernel.image == tree / "arch/x86/boot/bzImage"
    assert kernel.build == tree
    assert (kernel.modules / "kernel" / "kvm-amd.ko").read_text() == "module"
    assert (kernel.modules / "modules.dep").read_text() == "kernel/kvm-amd.ko:\n"
    assert said == [f"gathering the modules of {RELEASE} from {tree}"]
    assert find_kernel(str(tree), say=pytest.fail) == kernel


def test_a_relative_path(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    assert find_kernel("linux").build == tree
    assert find_kernel("./linux").build == tree


@pytest.mark.parametrize("part", ["arch/x86/boot/bzImage", "kvm-amd.ko", ".config", "Module.symvers"])
def test_a_rebuild_is_noticed(tree: Path, part: str) -> None:
    before = find_kernel(str(tree))
    later(tree / part, (tree / part).read_text())
    after = find_kernel(str(tree))
    assert after.identity != before.identity


def test_new_modules_are_gathered_and_old_ones_forgotten(tree: Path) -> None:
    for content in ("first", "second", "third"):
        later(tree / "kvm-amd.ko", content)
        kernel = find_kernel(str(tree))
        assert (kernel.modules / "kernel" / "kvm-amd.ko").read_text() == content
        for entry in (entries.root() / "trees").iterdir():  # their order is that of their times
            os.utime(entry, ns=(entry.stat().st_mtime_ns - 10**9,) * 2)
    assert len(entries.entries()) == 2


@pytest.mark.parametrize(
    ("missing", "target"),
    [("arch/x86/boot/bzImage", "bzImage"), ("modules.order", "modules"), (".config", "olddefconfig")],
)
def test_an_unfinished_tree_says_what_to_make(tree: Path, missing: str, target: str) -> None:
    (tree / missing).unlink()
    with pytest.raises(NoKernel, match=f"{missing} is not there") as caught:
        find_kernel(str(tree))
    assert f"make {target}" in caught.value.remedy


def test_a_tree_whose_configuration_does_not_do(tree: Path) -> None:
    (tree / ".config").write_text(CONFIG.format(version="6.13.0").replace("PARAVIRT_XXL=y", "PARAVIRT_XXL=n"))
    with pytest.raises(NoKernel, match="CONFIG_PARAVIRT_XXL=y"):
        find_kernel(str(tree))


def test_failed_gathering_leaves_no_entry_and_says_what_make_said(tree: Path) -> None:
    (tree / "fail").touch()
    with pytest.raises(HostLacks, match="modules_install"):
        find_kernel(str(tree))
    assert all(entry.leftover for entry in entries.entries())
    (tree / "fail").unlink()
    assert find_kernel(str(tree)).modules.is_dir()
