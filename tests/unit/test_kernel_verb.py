# SPDX-License-Identifier: Apache-2.0
"""`sevchaos kernel`, on an archive of tiny packages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from chaos.cache import entries
from chaos.cli.kernel_verb import kernel_
from chaos.cli.lab_verb import lab_
from chaos.errors import UsageError
from chaos.lab.kernel import archive, build
from chaos.lab.kernel.find import find_kernel
from tests.unit.fake_debian import FakeDebian, use

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb here")


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDebian:
    archive = FakeDebian(tmp_path / "archive")
    archive.add_kernel("6.1.0-56-amd64", "6.1.191-1", kbuild="linux-kbuild-6.1")
    archive.add_kernel("6.1.0-57-amd64", "6.1.192-3", kbuild="linux-kbuild-6.1")
    archive.add_kernel("6.12.117+deb12-amd64", "6.12.117-1~deb12u1")
    archive.add_name("linux-image-6.12.116+deb12-amd64")  # its package is gone
    use(monkeypatch, archive, tmp_path / "cache")
    return archive


def invoke(*arguments: str) -> Result:
    done = CliRunner().invoke(kernel_, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def rows(*arguments: str) -> dict[str, dict[str, object]]:
    return {row["kernel"]: row for row in json.loads(invoke("list", "--json", *arguments).stdout)}


def test_the_newest_of_each_series_with_the_findings_of_just_that_version(debian: FakeDebian) -> None:
    found = rows()
    assert list(found) == ["debian:6.1.0-57-amd64", "debian:6.12.117+deb12-amd64"]
    assert found["debian:6.1.0-57-amd64"]["version"] == "6.1.192"
    assert "0001" in str(found["debian:6.1.0-57-amd64"]["findings"])
    assert "0003" in str(found["debian:6.12.117+deb12-amd64"]["findings"])
    assert all(row["bytes"] is None for row in found.values())


def test_a_list_that_is_missing_is_told_each_time(debian: FakeDebian) -> None:
    assert "there is no list of" not in invoke("list").stderr
    for list_ in archive.lists().glob("*experimental*"):
        list_.unlink()
    debian.switch("no-experimental")
    invoke("list", "--refresh")
    assert "there is no list of experimental, so none of their kernels: --refresh" in invoke("list").stderr


def test_all_have_those_whose_image_and_headers_are_both_there(debian: FakeDebian) -> None:
    found = rows("--all")
    assert list(found) == ["debian:6.1.0-56-amd64", "debian:6.1.0-57-amd64", "debian:6.12.117+deb12-amd64"]
    assert found["debian:6.1.0-56-amd64"]["findings"] == []  # nobody has looked at 6.1.191


def test_what_is_here_is_listed_also_when_the_archive_has_it_no_more(debian: FakeDebian) -> None:
    find_kernel("debian:6.1.0-56-amd64")
    debian.remove("linux-image-6.1.0-56-amd64")
    row = rows()["debian:6.1.0-56-amd64"]
    assert row["gone"] is True
    assert isinstance(row["bytes"], int) and row["bytes"] > 0
    assert "(no longer in the archive)" in invoke("list").stdout


def test_fetch_builds_the_modules_too(debian: FakeDebian, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(build, "build", lambda name, **_: built.append(name))
    done = invoke("fetch", "debian:6.12")
    assert done.stdout == "debian:6.12: 6.12.117+deb12-amd64, Linux 6.12.117\n"
    assert built == ["kfault", "sevshim"]


def test_remove_takes_the_modules_along_and_nothing_else(debian: FakeDebian) -> None:
    first, second = find_kernel("debian:6.1"), find_kernel("debian:6.12")
    for kernel in (first, second):
        module = entries.entry_path("modules", f"{kernel.release}_{kernel.identity[:12]}")
        module.mkdir(parents=True)
    assert "removed 2 entries" in invoke("remove", "debian:6.1.0-57-amd64").stdout
    left = {entry.name.partition("_")[0] for entry in entries.entries() if entry.kind in ("kernels", "modules")}
    assert left == {second.release}


def test_a_series_means_the_one_of_it_that_is_here(debian: FakeDebian) -> None:
    find_kernel("debian:6.1.0-56-amd64"), find_kernel("debian:6.1")
    with pytest.raises(UsageError, match=r"of debian:6\.1 there are several here") as caught:
        invoke("remove", "debian:6.1")
    assert caught.value.remedy == "name one of debian:6.1.0-56-amd64, debian:6.1.0-57-amd64"
    invoke("remove", "debian:6.1.0-56-amd64")
    assert "removed 1 entries" in invoke("remove", "debian:6.1").stdout


def test_what_is_not_here_is_not_removed_nor_is_anything_else(debian: FakeDebian) -> None:
    find_kernel("debian:6.1")
    with pytest.raises(UsageError, match=r"debian:6\.12\.117\+deb12-amd64 is not here") as caught:
        invoke("remove", "debian:6.1.0-57-amd64", "debian:6.12.117+deb12-amd64")
    assert "debian:6.1.0-57-amd64" in caught.value.remedy
    assert [entry.kind for entry in entries.entries() if entry.kind == "kernels"] == ["kernels"]


def test_clean_leaves_kernels_and_labs_and_takes_all_beside_them(debian: FakeDebian) -> None:
    find_kernel("debian:6.12")
    for kind in ("snapshots", "images", "modules", "sources"):
        entries.entry_path(kind, "one").mkdir(parents=True)
    entries.staging("kernels", "unfinished")
    before = {entry.kind for entry in entries.entries() if not entry.leftover}
    assert {"apt", "kernels", "modules", "sources"} <= before
    assert "beside them: `sevchaos kernel clean`" in invoke("list").stderr
    invoke("clean")
    assert {entry.kind for entry in entries.entries()} == {"kernels", "images", "snapshots"}
    assert not any(entry.leftover for entry in entries.entries())


def test_of_labs_is_told_what_is_saved_of_them_alone(debian: FakeDebian) -> None:
    find_kernel("debian:6.12")
    entries.entry_path("snapshots", "one").mkdir(parents=True)
    shown = CliRunner().invoke(lab_, ["list", "--json"], catch_exceptions=False)
    assert [(row["kind"], row["name"]) for row in json.loads(shown.stdout)] == [("snapshots", "one")]
    assert "removed 1 entries" in CliRunner().invoke(lab_, ["clean"], catch_exceptions=False).stdout
    assert {entry.kind for entry in entries.entries()} >= {"apt", "kernels"}
