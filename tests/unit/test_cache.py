# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from chaos.cache import entries
from chaos.cache.command import run
from chaos.errors import ExitCode, HostLacks, NoSpace, UsageError

FORK = multiprocessing.get_context("fork")


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEVCHAOS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_entry(kind: str, name: str, content: bytes = b"x") -> Path:
    staged = entries.staging(kind, name)
    (staged / "file").write_bytes(content)
    return entries.publish(staged, kind, name)


# Where it is


def test_the_root_is_ours_then_xdgs_then_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert entries.root() == tmp_path / "cache"
    monkeypatch.delenv("SEVCHAOS_CACHE")
    assert entries.root() == tmp_path / "xdg" / "sevchaos"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert entries.root() == tmp_path / "home" / ".cache" / "sevchaos"
    assert entries.root().is_dir()


@pytest.mark.parametrize("bad", ["with space", "with:colon"])
def test_a_root_that_make_cannot_handle_is_refused(bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEVCHAOS_CACHE", str(tmp_path / bad))
    with pytest.raises(UsageError, match="space or a colon") as caught:
        entries.root()
    assert "SEVCHAOS_CACHE" in caught.value.remedy


def test_a_root_that_cannot_be_made_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEVCHAOS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(HostLacks, match="cannot be made") as caught:
        entries.root()
    assert "SEVCHAOS_CACHE" in caught.value.remedy


# Locks


def hold(pipe: Connection) -> None:
    with entries.locked("kernels", "one", say=quiet):
        pipe.send("kept")
        pipe.recv()


@pytest.fixture
def holder() -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    """Another process that holds the lock of kernels/one until it is sent something."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(theirs,))
    process.start()
    assert ours.poll(10)
    assert ours.recv() == "kept"
    yield process, ours
    process.kill()
    process.join(10)


def test_the_second_waits_and_says_for_whom(
    holder: tuple[multiprocessing.process.BaseProcess, Connection],
) -> None:
    process, pipe = holder
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        pipe.send("let go")  # only now, so the wait below was a real one

    with entries.locked("kernels", "one", say=say):
        process.join(10)
        assert process.exitcode == 0
    assert said == [f"waiting for process {process.pid}, which is at work on kernels/one in the cache"]


def test_locks_of_different_entries_are_different(
    holder: tuple[multiprocessing.process.BaseProcess, Connection],
) -> None:
    with entries.locked("kernels", "two", say=pytest.fail):
        pass


def test_a_killed_holder_holds_nothing(
    holder: tuple[multiprocessing.process.BaseProcess, Connection],
) -> None:
    process, _ = holder
    process.kill()
    process.join(10)
    with entries.locked("kernels", "one", say=pytest.fail):
        pass


def test_a_tool_that_outlives_its_killed_starter_still_holds_the_lock(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os
        from pathlib import Path
        from chaos.cache import entries
        from chaos.cache.command import run
        with entries.locked("kernels", "one", say=print) as lock:
            run(["sh", "-c", "echo $$ >pid; mv pid ready; exec sleep 60"], timeout=60, keep=(lock.fd,))
    """)
    starter = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=own_environment())
    tool = wait_for_number(tmp_path / "ready", starter)
    try:
        starter.kill()
        starter.wait(10)
        assert entries._lock("kernels", "one", wait=False, say=quiet) is None
    finally:
        os.kill(tool, signal.SIGKILL)
    with entries.locked("kernels", "one", say=quiet):
        pass


def own_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def wait_for_number(path: Path, process: subprocess.Popen[bytes]) -> int:
    for _ in range(1000):
        if path.exists():
            return int(path.read_text())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.02)
    pytest.fail(f"{path} did not appear")


def test_who_waited_while_the_lock_was_cleaned_away_gets_the_new_one(
    holder: tuple[multiprocessing.process.BaseProcess, Connection], own_cache: Path
) -> None:
    _, pipe = holder

    def say(_: str) -> None:
        (own_cache / "locks" / "kernels.one").unlink()
        pipe.send("let go")

    with entries.locked("kernels", "one", say=say):
        # Whoever comes now must find it held: both name the same file.
        assert entries._lock("kernels", "one", wait=False, say=quiet) is None


# Listing and cleaning


def test_entries_are_listed_with_kind_size_and_words() -> None:
    make_entry("kernels", "6.1", b"k" * 100_000)
    make_entry("surprise", "s")
    kernel, other = entries.entries()
    assert (kernel.kind, kernel.name, kernel.leftover) == ("kernels", "6.1", False)
    assert kernel.size >= 100_000
    assert kernel.what == "kernel fetched from Debian, unpacked"
    assert other.what == "other"


def test_a_sparse_file_counts_what_it_occupies() -> None:
    path = make_entry("snapshots", "s")
    with (path / "ram").open("wb") as ram:
        ram.truncate(1 << 30)
    assert entries.entries()[0].size < 1 << 20


def test_clean_removes_everything_by_default() -> None:
    make_entry("kernels", "6.1")
    entries.staging("kernels", "unfinished")
    with entries.locked("kernels", "6.1", say=quiet):
        pass
    cleaned = entries.clean(say=quiet)
    assert {entry.name for entry in cleaned.removed} == {"6.1", "unfinished"}
    assert cleaned.busy == ()
    assert entries.entries() == ()


def test_clean_by_kind_leaves_the_rest_and_takes_leftovers_of_the_kind() -> None:
    make_entry("kernels", "6.1")
    make_entry("snapshots", "6.1")
    entries.staging("kernels", "unfinished")
    entries.staging("tools", "unfinished")
    cleaned = entries.clean(kinds={"kernels"}, say=quiet)
    assert {(e.kind, e.name) for e in cleaned.removed} == {("kernels", "6.1"), ("kernels", "unfinished")}
    assert {(e.kind, e.name) for e in entries.entries()} == {("snapshots", "6.1"), ("tools", "unfinished")}


def test_clean_by_name_leaves_what_another_command_may_go_on_from() -> None:
    make_entry("kernels", "6.1")
    make_entry("kernels", "6.12")
    make_entry("snapshots", "6.1")
    entries.staging("tools", "unfinished")
    chosen = [entry for entry in entries.entries() if (entry.kind, entry.name) == ("kernels", "6.1")]
    cleaned = entries.remove(chosen, say=quiet)
    assert [(e.kind, e.name) for e in cleaned.removed] == [("kernels", "6.1")]
    left = [("kernels", "6.12"), ("snapshots", "6.1"), ("tools", "unfinished")]
    assert [(e.kind, e.name) for e in entries.entries()] == left


def test_what_another_process_is_making_is_left_to_it(
    holder: tuple[multiprocessing.process.BaseProcess, Connection],
) -> None:
    entries.staging("kernels", "one")
    cleaned = entries.clean(say=quiet)
    assert cleaned.removed == ()
    assert [e.name for e in cleaned.busy] == ["one"]
    assert entries.entries()[0].leftover


def test_a_removal_that_was_interrupted_is_a_leftover(own_cache: Path) -> None:
    (own_cache / "kernels" / ".6.1.4711.trash").mkdir(parents=True)
    assert [(e.name, e.leftover) for e in entries.entries()] == [("6.1", True)]
    entries.clean(kinds={"kernels"}, say=quiet)
    assert entries.entries() == ()


def test_read_only_directories_can_be_removed() -> None:
    path = make_entry("kernels", "6.1")
    (path / "sub").mkdir()
    (path / "sub" / "file").touch()
    (path / "sub").chmod(0o500)
    entries.discard(path)
    assert entries.entries() == ()


# Space


def test_too_little_space_is_said_before_anything_is_fetched() -> None:
    with pytest.raises(NoSpace, match=r"a kernel needs 10000\d\d MB") as caught:
        entries.check_space(10**12, "a kernel")
    assert caught.value.exit_code == ExitCode.NO_SPACE
    assert "SEVCHAOS_CACHE" in caught.value.remedy


def test_a_disk_that_becomes_full_is_no_space_with_what_is_needed() -> None:
    with pytest.raises(NoSpace, match="a kernel needs 500 MB"), entries.space_guard("a kernel", 500_000_000):
        Path("/dev/full").write_bytes(b"x")  # a real ENOSPC


def test_another_failure_is_not_taken_for_a_full_disk() -> None:
    with pytest.raises(FileNotFoundError), entries.space_guard("a kernel", 1):
        Path("/nonexistent/file").write_bytes(b"x")


# The tools


def test_a_tool_that_hangs_is_named_without_the_wall_of_its_words() -> None:
    argv = ["sh", "-c", "sleep 60", "apt-cache", "-o", "Dir::Cache=here", "show", *(f"package-{n}" for n in range(100))]
    with pytest.raises(HostLacks, match=r"`sh -c sleep 60 apt-cache show package-0 … \(99 more\)` did not end within"):
        run(argv, timeout=0.1)
