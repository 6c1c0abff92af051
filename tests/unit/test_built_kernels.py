# SPDX-License-Identifier: Apache-2.0
"""Building kernels, from sources whose makefile copies instead of compiling."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chaos.cache import entries
from chaos.cli.kernel_verb import kernel_
from chaos.errors import HostLacks, NoKernel, UsageError
from chaos.lab.kernel import built, edits, sources
from chaos.lab.kernel.built import Recipe, parse
from chaos.lab.kernel.find import LabKernel, build_kernel, find_kernel
from chaos.lab.kernel.kconfig import read_config
from tests.unit.fake_debian import FakeDebian, use

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb here")

VERSION = "7.3.4-1~bpo13+1"
MAKEFILE = """\
VERSION = 7
PATCHLEVEL = 3
SUBLEVEL = 4
release = 7.3.4$(shell sed -n 's/^CONFIG_LOCALVERSION="\\(.*\\)"/\\1/p' $(O)/.config)
into = $(INSTALL_MOD_PATH)/lib/modules/$(release)
tinyconfig:
\techo CONFIG_TINY=y > $(O)/.config
olddefconfig:
\techo CONFIG_PARAVIRT_XXL=y >> $(O)/.config
bzImage:
\tmkdir -p $(O)/arch/x86/boot $(O)/include/config
\tcat virt/kvm/kvm.c > $(O)/arch/x86/boot/bzImage
\t! grep '#error' virt/kvm/kvm.c
\ttest ! -e "$(FAIL)"
\techo '$(release)' > $(O)/include/config/kernel.release
\techo object > $(O)/kvm.o
\tmkdir -p $(O)/include/generated
\techo '--cfg' > $(O)/include/generated/rustc_cfg
\techo symbols > $(O)/Module.symvers
modules:
modules_install:
\tmkdir -p $(into)/kernel
\tcat virt/kvm/kvm.c > $(into)/kernel/kvm.ko
mrproper:
\trm -f stale.h
"""
KVM = "int kvm(void)\n{\n\treturn 1;\n}\n"
TREE = {
    "Kconfig": "config TINY\n",
    "Makefile": MAKEFILE,
    "arch/x86/kvm/Makefile": "obj-m := kvm.o\n",
    "virt/kvm/kvm.c": KVM,
    "drivers/crypto/ccp/Makefile": "\n",
    "kernel/cgroup/Makefile": "\n",
    "virt/kvm/Makefile.kvm": "\n",
    "drivers/gpu/huge.c": "not in a lab\n",
    "drivers/gpu/Kconfig": "config HUGE\n",
    "arch/arm/huge.c": "not in a lab\n",
    "arch/arm/crypto/Kconfig": "config ARM\n",
}


def fix(instead: str) -> str:
    return f"file virt/kvm/kvm.c\nin kvm\n-\treturn 1;\n+\t{instead}\n"


def packed(files: dict[str, str]) -> bytes:
    """As linux-source has it."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"linux-source-7.3/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return archive.getvalue()


def unpacked(files: dict[str, str], where: Path) -> Path:
    for name, text in files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)
    return where


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDebian:
    """What builds a kernel is here, and what mends one is one edit."""
    archive = FakeDebian(tmp_path / "archive")
    archive.add_kernel_in_parts("7.3.4+deb13-amd64", VERSION)
    archive.add("linux-source-7.3", VERSION, {"usr/src/linux-source-7.3.tar.xz": packed(TREE)})
    use(monkeypatch, archive, tmp_path / "cache")
    fixes = tmp_path / "fixes"
    fixes.mkdir()
    (fixes / "0001-it.edit").write_text(fix("return 2;"))
    monkeypatch.setattr(edits, "FIXES", fixes)
    monkeypatch.setattr(built, "_PACKAGES", {"make": "make"})
    monkeypatch.setattr(built, "_LIBELF", Path(__file__))
    return archive


def build(*words: str, base: str = "debian:7.3", said: list[str] | None = None) -> LabKernel:
    return build_kernel(base, words, say=(said if said is not None else []).append)


@pytest.mark.parametrize(
    ("source", "recipe"),
    [
        ("debian:7.3+kasan", Recipe("debian:7.3", ("kasan",))),
        ("debian:7.3+kasan+fixed", Recipe("debian:7.3", ("fixed", "kasan"))),
        ("debian:6.12.117+deb12-amd64+plain", Recipe("debian:6.12.117+deb12-amd64", ("plain",))),
        ("debian:6.12.117+deb12-amd64", None),
        ("/src/linux+kcsan", Recipe("/src/linux", ("kcsan",))),
        ("/src/c++/linux", None),
    ],
)
def test_a_name_says_what_is_in_a_kernel(source: str, recipe: Recipe | None) -> None:
    assert parse(source) == recipe


@pytest.mark.parametrize(
    "bad", ["debian:7.3+kasan+kcsan", "debian:7.3+plain+fixed", "debian:7.3+kasan+kmsan", "+kasan"]
)
def test_what_excludes_another_or_is_not_known_is_refused(bad: str) -> None:
    with pytest.raises(UsageError):
        parse(bad)


def test_a_kernel_is_built_once_and_found_by_its_name(debian: FakeDebian) -> None:
    said: list[str] = []
    kernel = build("kasan", said=said)
    assert (kernel.source, kernel.release, kernel.version) == ("debian:7.3+kasan", "7.3.4-kasan", "7.3.4")
    assert kernel.image.read_text() == KVM
    assert (kernel.modules / "kernel" / "kvm.ko").is_file()
    assert "CONFIG_KASAN=y\n" in (kernel.build / ".config").read_text()
    assert (kernel.build / "include" / "generated" / "rustc_cfg").is_file()  # kbuild asks for it, whatever the suffix
    assert not (kernel.build / "kvm.o").exists() and (kernel.build / "Module.symvers").is_file()
    assert any("fetching the sources of Linux 7.3.4" in line for line in said)
    assert find_kernel("debian:7.3+kasan") == kernel
    said.clear()
    assert build("kasan", said=said) == kernel
    assert said == []
    assert not any(entry.leftover for entry in entries.entries())


def test_the_sources_of_one_kernel_are_those_of_the_next_but_for_what_is_changed(debian: FakeDebian) -> None:
    plain, fixed = build("plain"), build("fixed")
    assert (plain.image.read_text(), fixed.image.read_text()) == (KVM, KVM.replace("1", "2"))
    assert plain.identity != fixed.identity
    trees = [kernel.build.parent for kernel in (plain, fixed)]
    same, other = ([tree / name for tree in trees] for name in ("Kconfig", "virt/kvm/kvm.c"))
    assert same[0].samefile(same[1]) and not other[0].samefile(other[1])
    assert debian.log().count("fetched linux-source-7.3") == 1
    assert "KCOV" not in (trees[0] / "arch/x86/kvm/Makefile").read_text()
    covered = build("kasan").build.parent
    assert "KCOV_INSTRUMENT := y" in (covered / "arch/x86/kvm/Makefile").read_text()
    assert "KCOV" not in (trees[0] / "arch/x86/kvm/Makefile").read_text()


def test_drivers_that_no_lab_has_stay_out_but_for_their_configuration(debian: FakeDebian) -> None:
    tree = build("plain").build.parent
    assert (tree / "drivers/gpu/Kconfig").is_file()
    assert not (tree / "drivers/gpu/huge.c").exists() and not (tree / "arch/arm/huge.c").exists()


def test_what_was_not_built_is_named_with_what_builds_it(debian: FakeDebian) -> None:
    with pytest.raises(NoKernel, match=r"debian:7\.3\+fixed\+kasan is not built") as caught:
        find_kernel("debian:7.3+kasan+fixed")
    assert "`sevchaos kernel build debian:7.3 --with fixes --with kasan`" in caught.value.remedy


def test_another_configuration_or_fix_makes_another_kernel(
    debian: FakeDebian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build("fixed")
    (edits.FIXES / "0001-it.edit").write_text(fix("return 3;"))
    with pytest.raises(NoKernel, match="is of an older state"):
        find_kernel("debian:7.3+fixed")
    assert build("fixed").identity != before.identity


def test_a_build_that_fails_shows_why_and_the_next_one_goes_on(debian: FakeDebian, tmp_path: Path) -> None:
    switch = tmp_path / "fail"
    switch.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIL", str(switch))
        with pytest.raises(NoKernel, match="building the kernel failed") as caught:
            build("plain")
    log = Path(caught.value.remedy.removeprefix("the whole log is "))
    assert "#error" in log.read_text()
    said: list[str] = []
    assert build("plain", said=said).release == "7.3.4-plain"
    assert not any("preparing" in line for line in said)


def test_an_option_that_these_sources_do_not_take_is_named(
    debian: FakeDebian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built.FRAGMENTS, tmp_path / "fragments")
    (tmp_path / "fragments" / "kasan.config").write_text("CONFIG_TINY=n\n# CONFIG_KVM is not set\nCONFIG_KASAN=y\n")
    monkeypatch.setattr(built, "FRAGMENTS", tmp_path / "fragments")
    monkeypatch.setattr(built, "read_config", lambda path: {**read_config(path), "KASAN": "m"})
    with pytest.raises(NoKernel, match=r"KASAN=y \(it is m\)"):
        build("kasan")


def test_a_version_whose_sources_the_archive_dropped_is_told_with_those_it_has(debian: FakeDebian) -> None:
    debian.add_kernel("7.3.3+deb13-amd64", "7.3.3-1")
    with pytest.raises(NoKernel, match=r"no linux-source-7\.3 of version 7\.3\.3-1; it has 7\.3\.4-1~bpo13\+1"):
        build("plain", base="debian:7.3.3+deb13-amd64")


def test_a_tree_of_the_users_is_copied_cleaned_and_never_changed(debian: FakeDebian, tmp_path: Path) -> None:
    tree = unpacked(TREE, tmp_path / "linux")
    for built_file in ("stale.h", "vmlinux", "kvm.o", "include/generated/autoconf.h", ".config"):
        unpacked({built_file: "of another build\n"}, tree)
    before = {path: path.stat() for path in tree.rglob("*")}
    kernel = build("fixed", base=str(tree))
    assert kernel.source == f"{tree}+fixed"
    assert kernel.image.read_text() == KVM.replace("1", "2")
    assert {path: path.stat() for path in tree.rglob("*")} == before
    ours = kernel.build.parent
    for gone in ("stale.h", "vmlinux", "kvm.o", "include/generated", ".config"):
        assert not (ours / gone).exists(), gone
    assert find_kernel(f"{tree}+fixed") == kernel
    (tree / "virt/kvm/kvm.c").write_text(f"{KVM}/* later */\n")
    with pytest.raises(NoKernel, match="older state"):
        find_kernel(f"{tree}+fixed")


def test_a_folder_that_is_no_kernel_tree_is_refused(debian: FakeDebian, tmp_path: Path) -> None:
    with pytest.raises(NoKernel, match="is no kernel source tree"):
        build("plain", base=str(tmp_path))


def test_a_missing_tool_is_named_before_anything_is_fetched(
    debian: FakeDebian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(built, "_LIBELF", tmp_path / "libelf.h")
    monkeypatch.setattr(built, "_PACKAGES", {"no-such-program": "its-package"})
    with pytest.raises(HostLacks, match="lacks its-package, libelf-dev") as caught:
        build("plain")
    assert caught.value.remedy.startswith("apt-get install its-package libelf-dev")
    assert debian.log() == []


@pytest.mark.parametrize("variable", ["KBUILD_OUTPUT", "O"])
def test_a_build_of_the_users_is_not_written_into(
    debian: FakeDebian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    tree, theirs = unpacked(TREE, tmp_path / "linux"), tmp_path / "theirs"
    theirs.mkdir()
    monkeypatch.setenv(variable, str(theirs))
    monkeypatch.setenv("LOCALVERSION", "-theirs")
    assert build("plain", base=str(tree)).release == "7.3.4-plain"
    assert list(theirs.iterdir()) == []


@pytest.mark.parametrize("done", ["prepared", "configured", "compiled"])
def test_a_build_that_was_killed_goes_on_after_what_was_done(
    debian: FakeDebian, monkeypatch: pytest.MonkeyPatch, done: str
) -> None:
    class Killed(BaseException):
        pass

    marked = built._Build.is_done

    def killed(build: built._Build, what: str, text: str = "") -> None:
        marked(build, what, text)
        if what == done:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(built._Build, "is_done", killed)
        with pytest.raises(Killed):
            build("kasan")
    made: list[str] = []
    monkeypatch.setattr(built._Build, "make", counted(made))
    kernel = build("kasan")
    assert "CONFIG_KASAN=y\n" in (kernel.build / ".config").read_text()
    todo = ["tinyconfig", "olddefconfig", "bzImage", "modules_install"]
    assert made == todo[{"prepared": 0, "configured": 2, "compiled": 4}[done] :]
    assert not any(entry.leftover for entry in entries.entries())


def counted(made: list[str]) -> Callable[..., str]:
    make = built._Build.make

    def make_and_count(build: built._Build, *arguments: str, **options: Any) -> str:
        made.append(next(word for word in arguments if "=" not in word))
        return make(build, *arguments, **options)

    return make_and_count


def test_a_half_made_configuration_is_made_anew(debian: FakeDebian, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would lack what the kernel is built for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(built, "check_config", lambda config, name: pytest.fail("not yet"))
        with pytest.raises(pytest.fail.Exception):
            build("kasan")
    assert "CONFIG_KASAN=y\n" in (build("kasan").build / ".config").read_text()


def test_what_is_built_is_used_without_sources_and_without_a_network(debian: FakeDebian) -> None:
    kernel = build("plain")
    entries.clean(kinds={"sources"}, say=lambda said: None)
    debian.switch("offline")
    assert find_kernel("debian:7.3+plain") == kernel
    fetched = debian.log().count("fetched linux-source-7.3")
    with pytest.raises(NoKernel, match="is not built"):
        find_kernel("debian:7.3+kasan")
    assert debian.log().count("fetched linux-source-7.3") == fetched == 1


def test_a_kernel_of_more_parts_is_no_older_state_of_one_of_fewer(debian: FakeDebian) -> None:
    build("fixed", "kasan")
    with pytest.raises(NoKernel, match="is not built"):
        find_kernel("debian:7.3+fixed")


def test_of_each_kernel_the_last_two_states_are_kept(debian: FakeDebian, tmp_path: Path) -> None:
    tree = unpacked(TREE, tmp_path / "linux")
    for number in range(3):
        (tree / "virt/kvm/kvm.c").write_text(f"{KVM}/* {number} */\n")
        build("plain", base=str(tree))
    assert len([entry for entry in entries.entries() if entry.kind == "built"]) == 2


@pytest.mark.parametrize("name", ["my linux", ".linux", "linux:7.3", "src/linux"])
def test_a_tree_of_any_name_is_built_and_found_by_it(debian: FakeDebian, tmp_path: Path, name: str) -> None:
    tree = unpacked(TREE, tmp_path / name)
    kernel = build("plain", base=str(tree))
    assert find_kernel(f"{tree}+plain") == kernel
    assert not kernel.build.parent.name.startswith(".")


def test_a_tree_of_gits_is_copied_as_git_has_it(debian: FakeDebian, tmp_path: Path) -> None:
    tree = unpacked({**TREE, ".gitignore": "*.o\nbzImage\n", "new.h": "not added yet\n"}, tmp_path / "linux")
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    subprocess.run(["git", "-C", str(tree), "add", "virt", "Makefile", "Kconfig", "arch"], check=True)
    before = build("plain", base=str(tree))
    unpacked({"kvm.o": "built\n", "arch/x86/boot/bzImage": "built\n"}, tree)
    assert find_kernel(f"{tree}+plain") == before
    assert (before.build.parent / "new.h").is_file() and not (before.build.parent / ".git").exists()


def test_to_remove_one_kernel_leaves_what_another_build_goes_on_from(debian: FakeDebian) -> None:
    build("plain")
    half = entries.staging("built", "another_plain_0")
    CliRunner().invoke(kernel_, ["remove", "debian:7.3+plain"], catch_exceptions=False)
    assert half.is_dir() and len([e for e in entries.entries() if e.kind == "built"]) == 1


def test_the_command_builds_lists_and_removes(debian: FakeDebian, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos.lab.kernel.find.build_modules", lambda kernel, say: None)

    def invoke(*arguments: str) -> str:
        done = CliRunner().invoke(kernel_, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert invoke("build", "debian:7.3") == "debian:7.3+plain: 7.3.4-plain, Linux 7.3.4\n"
    assert "7.3.4-fixed" in invoke("build", "debian:7.3", "--with", "fixes")
    assert "debian:7.3+plain" in invoke("list") and "(built here)" in invoke("list")
    invoke("remove", "debian:7.3+plain")
    assert "debian:7.3+plain" not in invoke("list")
    assert "debian:7.3+fixed" in invoke("list")
    assert sources.of_debian(VERSION).path.is_dir()
