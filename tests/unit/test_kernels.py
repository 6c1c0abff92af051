# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from chaos.cache import entries
from chaos.errors import HostLacks, NoKernel, NoSpace, UsageError
from chaos.lab.kernel import archive, fetched
from chaos.lab.kernel import debian as packages
from chaos.lab.kernel.debian import unpack, whole_kernels
from chaos.lab.kernel.find import LabKernel, find_busybox, find_kernel
from tests.unit.fake_debian import CONFIG, FakeDebian, static_elf, use

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb here")
FORK = multiprocessing.get_context("fork")
NEAR = ("near.example/dists/bookworm", "near.example/dists/bookworm-updates")
OLD, NEW = "6.1.0-47-amd64", "6.1.0-56-amd64"


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDebian:
    archive = FakeDebian(tmp_path / "archive")
    archive.add_kernel(NEW, "6.1.192-2", kbuild="linux-kbuild-6.1")
    use(monkeypatch, archive, tmp_path / "cache")
    return archive


class Said(list[str]):
    """What was said."""

    def __call__(self, message: str) -> None:
        self.append(message)

    def __contains__(self, part: object) -> bool:
        return any(str(part) in message for message in self)


@pytest.fixture
def said() -> Said:
    return Said()


def fetches(archive: FakeDebian) -> list[str]:
    return [line for line in archive.log() if line.startswith("fetched ")]


# What a fetched kernel is


def test_a_series_is_fetched_unpacked_and_described(debian: FakeDebian, said: Said) -> None:
    kernel = find_kernel("debian:6.1", say=said)
    assert (kernel.source, kernel.release, kernel.version) == ("debian:6.1", NEW, "6.1.192")
    assert kernel.image.read_bytes() == b"image of 6.1.192-2"
    assert (kernel.modules / "kernel/arch/x86/kvm/kvm-amd.ko").is_file()
    assert (kernel.modules / "modules.dep").is_file()
    assert "fetching kernel 6.1.0-56-amd64: linux-image-6.1.0-56-amd64, linux-headers" in said
    assert len(fetches(debian)) == 4


def test_kbuild_is_whatever_the_headers_ask_for(debian: FakeDebian, said: Said) -> None:
    debian.add_kernel("6.12.117+deb12-amd64", "6.12.117-1~deb12u1")
    kernel = find_kernel("debian:6.12", say=said)
    assert kernel.version == "6.12.117"
    assert "fetched linux-kbuild-6.12.117+deb12" in fetches(debian)
    assert "fetched linux-kbuild-6.1" not in fetches(debian)


def test_the_headers_work_where_they_stand(debian: FakeDebian, said: Said, tmp_path: Path) -> None:
    kernel = find_kernel("debian:6.1", say=said)
    assert subprocess.run(["make", "-s", "-C", kernel.build], timeout=30, check=False).returncode == 0
    assert (kernel.modules / "build").resolve() == kernel.build
    shutil.move(kernel.build.parents[2], tmp_path / "elsewhere")  # nothing in it knows where it is
    moved = tmp_path / "elsewhere" / "usr" / "src" / kernel.build.name
    assert subprocess.run(["make", "-s", "-C", moved], timeout=30, check=False).returncode == 0


def test_only_what_a_lab_needs_is_kept(debian: FakeDebian, said: Said) -> None:
    kernel = find_kernel("debian:6.1", say=said)
    entry = kernel.image.parents[1]
    assert not (entry / "usr" / "share").exists()
    assert not (kernel.modules / "kernel" / "drivers" / "gpu").exists()
    assert [e.path for e in entries.entries() if e.kind != "apt"] == [entry]  # no archives, no staging
    assert not list(entry.rglob("*.deb"))


def test_the_identity_is_of_the_contents_and_not_of_the_place(
    debian: FakeDebian, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find_kernel("debian:6.1", say=said)
    monkeypatch.setenv("SEVCHAOS_CACHE", str(tmp_path / "other"))
    again = find_kernel(f"debian:{NEW}", say=said)
    assert again.image != first.image
    assert again.identity == first.identity
    monkeypatch.setenv("SEVCHAOS_CACHE", str(tmp_path / "third"))
    debian.add_kernel(NEW, "6.1.192-3", kbuild="linux-kbuild-6.1")
    assert find_kernel("debian:6.1", say=said).identity != first.identity


def test_debian_13_has_its_modules_below_usr(debian: FakeDebian, said: Said) -> None:
    debian.add_kernel("6.12.118+deb13-amd64", "6.12.118-1", modules="usr/lib/modules")
    kernel = find_kernel("debian:6.12.118+deb13-amd64", say=said)
    assert (kernel.modules / "kernel/arch/x86/kvm/kvm-amd.ko").is_file()
    assert (kernel.modules / "modules.dep").is_file()
    assert not (kernel.modules / "kernel" / "drivers" / "gpu").exists()
    assert (kernel.modules / "build").resolve() == kernel.build


def test_a_kernel_in_parts_is_as_any_other(debian: FakeDebian, said: Said, tmp_path: Path) -> None:
    debian.add_kernel_in_parts("7.3.4+deb13-amd64", "7.3.4-1~bpo13+1")
    kernel = find_kernel("debian:7.3", say=said)
    assert (kernel.version, kernel.image.read_bytes()) == ("7.3.4", b"image of 7.3.4-1~bpo13+1")
    assert (kernel.modules / "kernel/arch/x86/kvm/kvm-amd.ko").is_file()
    assert not (kernel.modules / "kernel" / "drivers" / "gpu").exists()
    shutil.move(kernel.build.parents[2], tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "usr" / "src" / kernel.build.name
    assert subprocess.run(["make", "-s", "-C", moved], timeout=30, check=False).returncode == 0
    assert "KBUILD_OUTPUT:=$(abspath $(dir" in (moved / "Makefile").read_text()


def test_programs_for_a_newer_c_library_bring_it_along(debian: FakeDebian, said: Said, tmp_path: Path) -> None:
    """With the machine's own in its place: it runs any program, and is found where the tree stands."""
    loader = Path("/lib64/ld-linux-x86-64.so.2")
    if not loader.exists():
        pytest.skip("this machine has no glibc")
    place = "usr/lib/x86_64-linux-gnu"
    libraries = {path.name: path.resolve().read_bytes() for path in loader.resolve().parent.glob("libc.so.6")}
    debian.add("libc6", "99.9-1", {f"{place}/{loader.name}": loader.resolve().read_bytes()}, depends="libgcc-s1")
    debian.add("libgcc-s1", "16-1", {f"{place}/{name}": data for name, data in libraries.items()})
    program = Path(shutil.which("echo") or "").resolve().read_bytes()
    debian.add_kernel_in_parts("7.3.4+deb13-amd64", "7.3.4-1", program=program, libraries="libc6 (>= 99.9)")
    kernel = find_kernel("debian:7.3", say=said)
    shutil.move(kernel.build.parents[2], tmp_path / "elsewhere")
    modpost = tmp_path / "elsewhere/usr/lib/linux-kbuild-7.3.4+deb13/scripts/mod/modpost"
    assert modpost.read_bytes().startswith(b"#!/bin/sh\n")
    ran = subprocess.run([modpost, "it", "runs"], capture_output=True, timeout=30, check=False)
    assert (ran.stdout, ran.stderr) == (b"it runs\n", b"")


def test_a_c_library_that_will_do_is_not_fetched(debian: FakeDebian, said: Said) -> None:
    debian.add("libc6", "99.9-1", {})
    debian.add_kernel_in_parts("7.3.4+deb13-amd64", "7.3.4-1", libraries="libc6 (>= 2.4)")
    find_kernel("debian:7.3", say=said)
    assert "fetched libc6" not in fetches(debian)


# Which kernel


def test_the_newest_abi_is_the_highest_number_not_the_last_word(debian: FakeDebian, said: Said) -> None:
    debian.add_kernel("6.1.0-100-amd64", "6.1.200-1", kbuild="linux-kbuild-6.1")
    for other in ("6.1.0-101-cloud-amd64", "6.1.0-101-rt-amd64", "6.1.0-101-amd64-unsigned", "6.1-amd64"):
        debian.add_name(f"linux-image-{other}")
    debian.add_name("linux-image-6.1.0-102-amd64")  # a name that has outlived its package
    assert find_kernel("debian:6.1", say=said).release == "6.1.0-100-amd64"


def test_one_by_its_abi(debian: FakeDebian, said: Said) -> None:
    debian.add_kernel(OLD, "6.1.170-1", kbuild="linux-kbuild-6.1")
    kernel = find_kernel(f"debian:{OLD}", say=said)
    assert (kernel.release, kernel.version) == (OLD, "6.1.170")


def test_an_abi_in_the_cache_needs_no_apt(debian: FakeDebian, said: Said) -> None:
    first = find_kernel(f"debian:{NEW}", say=said)
    for name in (f"linux-image-{NEW}", f"linux-headers-{NEW}"):
        debian.remove(name)
    before = debian.log()
    assert find_kernel(f"debian:{NEW}", say=pytest.fail) == first
    assert debian.log() == before


def test_apt_is_asked_again_only_when_its_lists_have_changed(debian: FakeDebian, said: Said) -> None:
    first = find_kernel("debian:6.1", say=said)
    before = debian.log()
    assert find_kernel("debian:6.1", say=pytest.fail) == first
    assert debian.log() == before
    debian.add_kernel("6.1.0-57-amd64", "6.1.193-1", kbuild="linux-kbuild-6.1")
    assert find_kernel("debian:6.1", say=pytest.fail) == first
    debian.lists_changed()
    assert find_kernel("debian:6.1", say=said).version == "6.1.193"


def test_a_cache_without_lists_means_what_it_meant(debian: FakeDebian, said: Said) -> None:
    first = find_kernel("debian:6.1", say=said)
    shutil.rmtree(archive.lists().parent)
    debian.switch("offline")
    assert find_kernel("debian:6.1", say=pytest.fail) == first


def test_space_for_the_lists_is_looked_at_before_they_are_fetched(
    debian: FakeDebian, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(NoSpace, match=r"fetching Debian's package lists needs .* MB in .*, and 0\.0 MB are free"):
        find_kernel("debian:6.1", say=said)
    assert debian.log() == []


def test_without_a_network_an_older_cached_one_does_and_it_is_said(debian: FakeDebian, said: Said) -> None:
    first = find_kernel("debian:6.1", say=said)
    debian.add_kernel("6.1.0-57-amd64", "6.1.193-1", kbuild="linux-kbuild-6.1")
    debian.lists_changed()
    debian.switch("offline")
    assert find_kernel("debian:6.1", say=said) == first
    assert "6.1.0-57-amd64 cannot be had" in said
    assert f"using {NEW} from the cache" in said


def test_a_series_that_the_archive_dropped_is_taken_from_the_cache(debian: FakeDebian, said: Said) -> None:
    first = find_kernel("debian:6.1", say=said)
    debian.remove(f"linux-image-{NEW}")
    debian.lists_changed()
    assert find_kernel("debian:6.1", say=said) == first
    assert f"using {NEW} from the cache" in said


# What goes wrong


@pytest.mark.parametrize(
    "bad", ["", "debian", "debian:", "debian:6", "debian:bookworm", "debian:6.1.0-56-arm64", "6.1", "installed:"]
)
def test_a_source_that_can_be_none_is_refused_with_what_is_allowed(debian: FakeDebian, bad: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_kernel(bad)
    assert "debian:6.1" in caught.value.remedy
    assert debian.log() == []


def test_an_unknown_series_names_the_known_kernels(debian: FakeDebian) -> None:
    with pytest.raises(NoKernel, match=r"archive has no 5\.10 kernel; it has 6\.1\.0-56-amd64") as caught:
        find_kernel("debian:5.10")
    assert "kernel list --refresh" in caught.value.remedy


def test_no_lists_to_be_had_is_told_from_an_archive_without_the_kernel(debian: FakeDebian) -> None:
    debian.switch("offline")
    with pytest.raises(NoKernel, match=r"(?s)fetching Debian's package lists.*Could not resolve") as caught:
        find_kernel("debian:5.10")
    assert "is there a network?" in caught.value.remedy


def test_the_lists_are_fetched_once_and_each_is_of_the_machines_mirror(debian: FakeDebian, said: Said) -> None:
    find_kernel("debian:6.1", say=said)
    assert debian.log().count("apt-get update -q") == 1
    sources = (archive.lists().parent / "sources.list").read_text().splitlines()
    assert (
        f"deb [arch=amd64 signed-by={archive.KEYRING}] http://mirror.example/debian/ trixie-backports main" in sources
    )
    assert [line.split()[-3] for line in sources if "-security" in line] == [archive.SECURITY] * 2
    debian.switch("offline")
    archive.refresh(say=said)  # what was there stays
    assert "no list was to be had" not in said
    find_kernel("debian:6.1", say=said)


@pytest.mark.parametrize(
    ("sources", "mirror"),
    [
        (("vendor.example/debian/prod/dists/bookworm", *NEAR), "http://near.example/"),
        (("archive.example/ubuntu/dists/noble", "archive.example/ubuntu/dists/noble-updates"), archive.MIRROR),
        (("vendor.example/debian/prod/dists/bookworm",), archive.MIRROR),
        ((), archive.MIRROR),
    ],
)
def test_the_mirror_is_the_one_that_has_debians_suites(
    debian: FakeDebian, said: Said, sources: Sequence[str], mirror: str
) -> None:
    (debian.where / "sources").write_text("\n".join(f"http://{place}" for place in sources))
    find_kernel("debian:6.1", say=said)
    written = (archive.lists().parent / "sources.list").read_text().splitlines()
    assert {line.split()[-3] for line in written if "-security" not in line} == {mirror}


def test_a_suite_that_the_mirror_lacks_is_told(debian: FakeDebian, said: Said) -> None:
    debian.switch("no-experimental")
    find_kernel("debian:6.1", say=said)
    assert "no list was to be had of experimental: W: Some index files failed" in said
    assert archive.lacking() == ("experimental",)


def test_without_debians_keyring_nothing_is_believed(debian: FakeDebian) -> None:
    archive.KEYRING.unlink()
    with pytest.raises(NoKernel, match=r"keyring\.gpg is not there") as caught:
        find_kernel("debian:6.1")
    assert "debian-archive-keyring" in caught.value.remedy


def test_the_machines_own_debian_comes_before_a_newer_one(debian: FakeDebian, said: Said) -> None:
    debian.add_kernel("6.12.117+deb12-amd64", "6.12.117-1~deb12u1")
    debian.add_kernel("6.12.118+deb13-amd64", "6.12.118-1")
    assert find_kernel("debian:6.12", say=said).version == "6.12.117"
    debian.add_kernel("7.2.12+deb13-amd64", "7.2.12-1~bpo13+1")
    debian.add_kernel("7.2.13+deb14-amd64", "7.2.13-1")
    debian.lists_changed()
    assert find_kernel("debian:7.2", say=said).version == "7.2.13"


def test_without_apt_the_other_ways_are_named(debian: FakeDebian, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(debian.where / "nothing"))
    with pytest.raises(NoKernel, match="this machine has none") as caught:
        find_kernel("debian:6.1")
    for way in ("running", "installed:", "build tree"):
        assert way in caught.value.remedy


def test_every_missing_option_is_named_with_its_purpose(debian: FakeDebian, said: Said) -> None:
    config = CONFIG.replace("CONFIG_KVM_AMD=m", "CONFIG_KVM_AMD=y")
    config = config.replace("CONFIG_CGROUP_MISC=y", "# CONFIG_CGROUP_MISC is not set")
    config += "CONFIG_MODULE_SIG_FORCE=y\n"
    debian.add_kernel(OLD, "6.1.170-1", kbuild="linux-kbuild-6.1", config=config)
    with pytest.raises(NoKernel) as caught:
        find_kernel(f"debian:{OLD}", say=said)
    message = caught.value.message
    assert "CONFIG_KVM_AMD=m (it has y): the code under test" in message
    assert "CONFIG_CGROUP_MISC=y (it has n): the misc controller" in message
    assert "CONFIG_MODULE_SIG_FORCE=n (it has y)" in message
    assert message.count("CONFIG_") == 3


def test_headers_of_an_unknown_layout_are_refused(debian: FakeDebian, said: Said) -> None:
    debian.add_kernel(OLD, "6.1.170-1", kbuild="linux-kbuild-6.1", makefile="include somewhere/Makefile\n")
    with pytest.raises(NoKernel, match="not laid out"):
        find_kernel(f"debian:{OLD}", say=said)


def test_a_full_disk_as_apt_says_it(debian: FakeDebian, said: Said) -> None:
    archive.refresh(say=said)
    debian.switch("full")
    with pytest.raises(NoSpace, match=r"kernel 6\.1\.0-56-amd64 needs"):
        find_kernel("debian:6.1", say=said)


def test_a_disk_too_full_for_apt_to_read_its_lists_is_no_archive_without_kernels(
    debian: FakeDebian, said: Said
) -> None:
    archive.refresh(say=said)
    debian.switch("full-for-lists")
    with pytest.raises(NoSpace, match="became full reading Debian's package lists"):
        find_kernel("debian:6.1", say=said)
    with pytest.raises(NoSpace):
        archive.refresh(say=said)


def test_lists_that_never_came_whole_are_fetched_again(debian: FakeDebian, said: Said) -> None:
    """Half of them would name an older kernel the newest."""
    debian.switch("full-for-lists")
    with pytest.raises(NoSpace):
        find_kernel("debian:6.1", say=said)
    debian.switch("full-for-lists", on=False)
    assert find_kernel("debian:6.1", say=said).release == NEW
    assert len([line for line in debian.log() if line.startswith("apt-get update")]) == 2


def test_a_damaged_download_is_told_from_one_that_broke_off(debian: FakeDebian, said: Said) -> None:
    debian.switch("damaged")
    with pytest.raises(NoKernel, match="Hash Sum mismatch") as caught:
        find_kernel("debian:6.1", say=said)
    assert "none of it is used" in caught.value.remedy
    assert "Get:1" not in caught.value.message
    debian.switch("damaged", on=False)
    find_kernel("debian:6.1", say=said)
    assert "here already" not in said


def test_a_download_that_stalls_is_told_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every five seconds it is looked at."""
    told: list[str] = []
    seconds = iter(range(0, 1000, 5))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    tell = packages._progress(tmp_path, 3_000_000, told.append)
    for size, times in ((1_000_000, 13), (2_000_000, 2)):
        (tmp_path / "a.deb").write_bytes(b" " * size)
        for _ in range(times):
            tell()
    stalled = [f"  1.0 MB of 3.0 MB, and nothing more for {after} s" for after in (30, 60)]
    assert told == ["  1.0 MB of 3.0 MB", *stalled, "  2.0 MB of 3.0 MB"]


def test_a_name_without_a_package_is_not_searched_for(debian: FakeDebian, said: Said) -> None:
    """apt takes one for a pattern and tries it on every name there is, which takes seconds."""
    debian.add_name("linux-image-6.12.116+deb12-amd64")
    assert whole_kernels(say=said) == {NEW: "6.1.192-2"}
    assert not [line for line in debian.log() if line.startswith("apt-cache show")]


def test_space_is_looked_at_before_fetching(debian: FakeDebian, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.refresh(say=said)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(NoSpace, match=r"needs .* MB in .*, and 0\.0 MB are free"):
        find_kernel("debian:6.1", say=said)
    assert fetches(debian) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_disk_that_becomes_full_while_unpacking(
    debian: FakeDebian, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(mount, timeout=30, check=False).returncode != 0:
        pytest.skip("a tmpfs may not be mounted here")
    try:
        monkeypatch.setenv("SEVCHAOS_CACHE", str(small / "cache"))
        monkeypatch.setattr(entries, "check_space", lambda *_: None)
        with pytest.raises(NoSpace, match="full"):
            find_kernel("debian:6.1", say=said)
    finally:
        subprocess.run(["umount", "-l", small], timeout=30, check=True)


# Interrupted, at once, damaged


def fetch_in_background(archive: FakeDebian) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=find_kernel, args=("debian:6.1",))
    process.start()
    deadline = time.monotonic() + 20
    while not fetches(archive):
        assert time.monotonic() < deadline, "the fetch did not begin"
        time.sleep(0.01)
    return process


def test_a_killed_fetch_is_resumed(debian: FakeDebian, said: Said) -> None:
    debian.switch("hang-after-first")
    process = fetch_in_background(debian)
    process.kill()
    process.join(10)
    debian.kill_apt()  # it has outlived its starter, and holds the lock
    kernel = find_kernel("debian:6.1", say=said)
    assert kernel.image.is_file()
    assert "of them here already" in said
    assert f"kept linux-image-{NEW}" in debian.log()
    assert fetches(debian).count(f"fetched linux-image-{NEW}") == 1


def test_a_killed_unpacking_is_begun_anew(debian: FakeDebian, said: Said) -> None:
    rest = entries.staging("kernels", f"{NEW}_6.1.192-2") / "tree"
    (rest / "lib" / "modules" / NEW / "kernel").mkdir(parents=True)
    (rest / "lib" / "modules" / NEW / "kernel" / "half.ko").touch()
    kernel = find_kernel("debian:6.1", say=said)
    assert not list(kernel.modules.rglob("half.ko"))


def test_who_waited_takes_over_from_one_that_failed(debian: FakeDebian) -> None:
    debian.switch("hang-after-first")
    first = fetch_in_background(debian)
    second = FORK.Process(target=find_kernel, args=("debian:6.1",))
    second.start()
    time.sleep(0.3)  # not needed for the result to be right; it makes a wrong one likelier
    assert second.is_alive()
    debian.kill_apt()
    first.join(20)
    second.join(20)
    assert (first.exitcode, second.exitcode) == (1, 0)
    assert len(fetches(debian)) == 4


def test_many_at_once(debian: FakeDebian) -> None:
    together = [FORK.Process(target=find_kernel, args=("debian:6.1",)) for _ in range(4)]
    for process in together:
        process.start()
    for process in together:
        process.join(30)
    assert [process.exitcode for process in together] == [0, 0, 0, 0]
    assert len(fetches(debian)) == 4  # four packages, each once


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda k: k.image.write_bytes(b"short"), "boot/vmlinuz-6.1.0-56-amd64 has 5 bytes instead of 18"),
        (lambda k: (k.modules / "kernel/arch/x86/kvm/kvm-amd.ko").unlink(), "a module is missing"),
        (lambda k: (k.build / "Makefile").unlink(), "Makefile is missing"),
        (lambda k: (k.image.parents[1] / "manifest.json").write_text("{"), "manifest cannot be read"),
        (lambda k: (k.image.parents[1] / "manifest.json").unlink(), "manifest cannot be read"),
    ],
    ids=["image", "module", "headers", "manifest", "no manifest"],
)
@pytest.mark.parametrize("source", ["debian:6.1", f"debian:{NEW}"])
def test_a_damaged_entry_is_noticed_and_fetched_again(
    debian: FakeDebian, said: Said, source: str, damage: object, word: str
) -> None:
    assert callable(damage)
    first = find_kernel(source, say=said)
    damage(first)
    assert find_kernel(source, say=said) == first
    assert word in said
    assert "has to be fetched again" in said
    assert first.image.read_bytes() == b"image of 6.1.192-2"
    assert find_kernel(source, say=pytest.fail) == first


def test_an_entry_of_another_layout_is_fetched_again(
    debian: FakeDebian, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find_kernel("debian:6.1", say=said)
    monkeypatch.setattr(fetched, "_LAYOUT", fetched._LAYOUT + 1)
    assert find_kernel("debian:6.1", say=said).identity != first.identity
    assert "it has layout" in said


@pytest.mark.parametrize("leave", [(), ("./nothing",)])
def test_a_broken_archive_is_not_half_unpacked_in_silence(
    debian: FakeDebian, tmp_path: Path, leave: tuple[str, ...]
) -> None:
    broken = tmp_path / "broken.deb"
    broken.write_bytes((debian.where / f"linux-image-{NEW}.deb").read_bytes()[:-200])
    (tmp_path / "into").mkdir()
    with entries.locked("kernels", "broken", say=pytest.fail) as lock:
        with pytest.raises(HostLacks, match=r"unpacking broken\.deb"):
            unpack(broken, tmp_path / "into", lock=lock, leave=leave)


# Busybox


def test_busybox_is_fetched_once_and_again_when_damaged(debian: FakeDebian, said: Said) -> None:
    debian.add("busybox-static", "1:1.35.0-4", {"bin/busybox": static_elf()})
    path = find_busybox(say=said)
    assert path.read_bytes() == static_elf()
    assert find_busybox(say=pytest.fail) == path
    path.write_bytes(static_elf()[:-50])
    assert find_busybox(say=said) == path
    assert "damaged" in said
    assert path.read_bytes() == static_elf()


def test_a_busybox_that_needs_libraries_will_not_do(
    debian: FakeDebian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "bin"
    own.mkdir()
    monkeypatch.setenv("PATH", str(own))
    (own / "busybox").write_bytes(static_elf(interpreter=True))
    (own / "busybox").chmod(0o755)
    with pytest.raises(HostLacks, match="statically linked busybox"):
        find_busybox()
    (own / "busybox").write_bytes(static_elf())
    assert find_busybox() == own / "busybox"


def test_a_kernel_is_a_value(debian: FakeDebian, said: Said) -> None:
    kernel = find_kernel("debian:6.1", say=said)
    assert isinstance(kernel, LabKernel)
    with pytest.raises(AttributeError):
        kernel.release = "other"  # type: ignore[misc]
