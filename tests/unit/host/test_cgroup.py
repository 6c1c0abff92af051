# SPDX-License-Identifier: Apache-2.0
"""Cgroups: texts of both kernels in a fake tree, and, where one can be written to, the real hierarchy."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.cgroup.group import Cgroup, find_hierarchy
from chaos.errors import CleanupFailed, HostLacks
from chaos.safety import claim
from chaos.safety.survey import Paths, hierarchy

V6_12 = {
    "misc.current": "sev 1\nsev_es 0\n",
    "misc.max": "sev 3\nsev_es max\n",
    "misc.peak": "sev 2\nsev_es 0\n",
    "misc.events": "sev.max 4\nsev_es.max 0\n",
    "misc.events.local": "sev.max 1\nsev_es.max 0\n",
    "cgroup.stat": "nr_descendants 2\nnr_dying_descendants 1\n",
    "cgroup.events": "populated 1\nfrozen 0\n",
    "cgroup.controllers": "cpuset misc\n",
    "cgroup.subtree_control": "cpuset\n",
}
V6_1 = {name: text for name, text in V6_12.items() if name not in ("misc.peak", "misc.events.local")}


def tree(path: Path, files: dict[str, str]) -> Cgroup:
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return Cgroup.at(path)


def test_all_files_of_6_12(tmp_path: Path) -> None:
    assert tree(tmp_path, V6_12).misc() == {
        "current": {"sev": 1, "sev_es": 0},
        "max": {"sev": 3},
        "peak": {"sev": 2, "sev_es": 0},
        "events": {"sev.max": 4, "sev_es.max": 0},
        "events.local": {"sev.max": 1, "sev_es.max": 0},
    }


def test_what_6_1_does_not_have_is_left_out(tmp_path: Path) -> None:
    assert set(tree(tmp_path, V6_1).misc()) == {"current", "max", "events"}
    assert tree(tmp_path / "root", {"misc.capacity": "sev 8\n"}).current() is None
    assert tree(tmp_path, V6_1).capacity() is None


def test_events_of_the_whole_cgroup(tmp_path: Path) -> None:
    group = tree(tmp_path, V6_1)
    assert (group.populated, group.frozen) == (True, False)
    assert not tree(tmp_path, {"cgroup.events": "populated 0\nfrozen 0\n"}).populated


def test_keys_without_capacity_are_not_there(tmp_path: Path) -> None:
    group = tree(tmp_path, {"misc.current": "", "misc.max": "", "misc.events": ""})
    assert group.misc() == {"current": {}, "max": {}, "events": {}}


def test_one_below_zero_reads_as_that(tmp_path: Path) -> None:
    """As 6.1.192 shows the source's cgroup after a SEV-ES guest was moved out of it."""
    assert tree(tmp_path, {"misc.current": "sev 18446744073709551615\nsev_es 1\n"}).current() == {
        "sev": -1,
        "sev_es": 1,
    }


def test_the_rest(tmp_path: Path) -> None:
    group = tree(tmp_path, V6_12 | {"misc.capacity": "sev 8\nsev_es 7\n"})
    assert group.capacity() == {"sev": 8, "sev_es": 7}
    assert group.dying() == 1
    assert group.populated
    assert group.has("misc") and not group.has("rdma")


@pytest.mark.parametrize(("number", "text"), [(3, "sev 3"), (0, "sev 0"), (None, "sev max")])
def test_limits_are_written_a_key_at_a_time(tmp_path: Path, number: int | None, text: str) -> None:
    group = tree(tmp_path, V6_12)
    group.limit("sev", number)
    assert (tmp_path / "misc.max").read_text() == text


def test_a_controller_is_enabled_once(tmp_path: Path) -> None:
    group = tree(tmp_path, V6_12)
    group.enable("cpuset")
    assert (tmp_path / "cgroup.subtree_control").read_text() == "cpuset\n"
    group.enable("misc")
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+misc"


def test_the_tree(tmp_path: Path) -> None:
    root = tree(tmp_path / "run", {})
    child = root.create("source")
    child.create("deeper")
    root.create("another")
    (tmp_path / "run" / "a file").touch()
    assert [group.path.name for group in root.walk()] == ["run", "another", "source", "deeper"]
    with pytest.raises(FileExistsError):
        root.create("source")
    with pytest.raises(OSError, match="not empty"):
        child.remove()
    child.child("deeper").remove()
    child.remove()
    assert not child.exists


def test_a_missing_cgroup_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Cgroup.at(tmp_path / "nowhere").children()


MOUNTS = """\
22 27 0:20 / /sys rw - sysfs sysfs rw
31 22 0:38 / /sys/fs/cgroup{} rw,relatime shared:9 - cgroup2 cgroup2 rw
"""


@pytest.mark.parametrize("place", ["", "/unified"])
def test_the_hierarchy_is_found_where_it_is_mounted(tmp_path: Path, place: str) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS.format(place))
    assert find_hierarchy(tmp_path / "mountinfo") == Path(f"/sys/fs/cgroup{place}")


def test_no_hierarchy_is_a_lack_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("22 27 0:20 / /sys rw - sysfs sysfs rw\n")
    with pytest.raises(HostLacks, match="no unified"):
        find_hierarchy(tmp_path / "mountinfo")


@pytest.mark.parametrize(
    ("files", "lacking"),
    [
        ({"cgroup.controllers": "cpuset cpu\n", "misc.capacity": "sev 8\n"}, "misc cgroup controller is not in"),
        ({"cgroup.controllers": "cpuset cpu\n", "cgroup.type": "domain\n"}, "so it is not the host's root but"),
        ({"cgroup.controllers": "cpuset misc\n"}, "has no misc.capacity, so it is not the host's root"),
        ({"cgroup.controllers": "cpuset misc\n", "misc.capacity": ""}, ""),  # a host without SEV has none of its keys
    ],
)
def test_what_is_not_the_hosts_root_tells_no_capacity_and_is_not_taken_for_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], lacking: str
) -> None:
    tree(tmp_path, files)
    monkeypatch.setattr("chaos.safety.survey.find_hierarchy", lambda _: tmp_path)
    if not lacking:
        assert hierarchy(Paths()).path == tmp_path
        return
    with pytest.raises(HostLacks, match=lacking):
        hierarchy(Paths())


# -- the real one -----------------------------------------------------------------------------------------


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cgroup]:
    """A cgroup of ours in the real hierarchy. The misc controller need not be there."""
    try:
        root = Cgroup.at(find_hierarchy())
        group = root.create(f"sevchaos-test-{os.getpid()}")
    except (HostLacks, OSError) as lacking:
        pytest.skip(f"no cgroup can be made here: {lacking}")
    monkeypatch.setattr(Cgroup, "enable", lambda self, controller: None)
    yield group
    group.destroy()


def sleeper_in(group: Cgroup) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(["sleep", "600"])
    procs = group.open_procs()
    os.write(procs, str(process.pid).encode())
    os.close(procs)
    return process


def test_destroying_kills_what_lives_in_it_and_below(real: Cgroup) -> None:
    run = real.create("run")
    inner = run.create("source").create("deeper")
    sleeper = sleeper_in(inner)
    assert inner.processes() == (sleeper.pid,) and run.populated
    with pytest.raises(CleanupFailed, match=f"processes {sleeper.pid} are still there"):
        run.wait_empty(0.01)
    run.destroy()
    assert not run.exists
    assert sleeper.wait() == -signal.SIGKILL
    run.destroy()  # what is not there is as good as destroyed


LEADERLESS = """
import ctypes, sys, threading, time
from pathlib import Path
ready, go = (Path(argument) for argument in sys.argv[1:])
def live():
    ready.touch()
    while not go.exists():
        time.sleep(0.005)
    time.sleep(600)
threading.Thread(target=live).start()
ctypes.CDLL(None).syscall(60, 0)
"""


def leaderless(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process that lives although its first thread has ended."""
    ready = tmp_path / "ready"
    process = subprocess.Popen([sys.executable, "-c", LEADERLESS, ready, tmp_path / "go"])
    stat = Path(f"/proc/{process.pid}/stat")
    deadline = time.monotonic() + 20
    while not (ready.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("when", ["before", "after"])
def test_destroying_ends_what_cgroup_kill_passes_over(
    real: Cgroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Of kernels that have finding 0012; here cgroup.kill does nothing at all. Whoever comes without its first thread
    is in no cgroup.procs of where it came to."""
    monkeypatch.setattr(Cgroup, "kill", lambda self: None)
    run = real.create("run")
    inner = run.create("source")
    if when == "before":
        procs = inner.open_procs()
        child = f"import os; os.write({procs}, b'0'); exec({LEADERLESS!r})"
        process = subprocess.Popen([sys.executable, "-c", child, tmp_path / "ready", tmp_path / "go"], pass_fds=[procs])
        os.close(procs)
        deadline = time.monotonic() + 20
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
    else:
        process = leaderless(tmp_path)
        inner.admit(process.pid)
    assert run.populated
    run.destroy()
    assert not run.exists
    assert process.wait(timeout=20) == -signal.SIGKILL


def test_destroying_harms_nobody_outside(real: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cgroup, "kill", lambda self: None)
    run, beside = real.create("run"), real.create("beside")
    inside, outside = sleeper_in(run), sleeper_in(beside)
    run.destroy()
    assert inside.wait() == -signal.SIGKILL
    assert outside.poll() is None and beside.processes() == (outside.pid,)
    beside.destroy()
    assert outside.wait() == -signal.SIGKILL


def test_a_claim_is_held_by_its_owner_alone(real: Cgroup) -> None:
    claimed = claim.claim(real, "an-experiment")
    assert claimed.cgroup.path.parent == real.path / "sevchaos"
    assert claimed.cgroup.name == f"an-experiment-{os.getpid()}-0"
    second = claim.claim(real, "an-experiment")
    assert second.cgroup.name == f"an-experiment-{os.getpid()}-1"
    assert claim.clean(real) == ()
    second.give_up()
    claimed.give_up()
    assert claim.clean(real) == ()
    assert real.children() == ()


def test_what_dead_runs_left_is_cleaned_and_live_ones_are_spared(real: Cgroup) -> None:
    live = claim.claim(real, "live")
    left = claim.claim(real, "left")
    path = left.cgroup.create("source").path.parent
    sleeper = sleeper_in(left.cgroup.child("source"))
    left._lock.close()  # as the death of its owner does
    assert claim.clean(real) == (path,)
    assert sleeper.wait() == -signal.SIGKILL
    assert live.cgroup.exists
    live.give_up()
    assert claim.clean(real) == ()


RUNNER = """
import sys, time
from pathlib import Path
from chaos.safety import claim
from chaos.cgroup.group import Cgroup
Cgroup.enable = lambda self, controller: None
from chaos.safety.warden import Warden
warden = Warden()
claimed = claim.claim(Cgroup.at(Path(sys.argv[1])), "run")
warden.guard(claimed)
for name in sys.argv[3:]:
    warden.remember(Path(name), "as it was")
if sys.argv[3:]:
    warden.forget(Path(sys.argv[3]), "as it was")
print(claimed.cgroup.path, warden.pid, flush=True)
if sys.argv[2] == "sleep":
    time.sleep(600)
claimed.give_up()
warden.dismiss()
"""


def test_the_warden_removes_what_a_killed_runner_leaves(real: Cgroup) -> None:
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, real.path, "sleep"], stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    path = Path(runner.stdout.readline().split()[0])
    sleeper = sleeper_in(Cgroup.at(path).create("source"))
    runner.kill()
    runner.wait()
    assert runner.stdout.read() == ""  # nobody else keeps its output open
    assert sleeper.wait(timeout=20) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not path.exists()


def test_the_warden_restores_what_a_killed_runner_had_not(real: Cgroup, tmp_path: Path) -> None:
    settings = [tmp_path / name for name in ("undone", "not-undone", "gone")]
    for setting in settings[:2]:
        setting.write_text("changed")
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, real.path, "sleep", *settings], stdout=subprocess.PIPE, text=True
    )
    assert runner.stdout is not None
    warden = int(runner.stdout.readline().split()[1])
    handle = os.pidfd_open(warden)
    runner.kill()
    runner.wait()
    runner.stdout.close()
    assert select.select([handle], [], [], 20)[0]
    os.close(handle)
    assert [setting.read_text() for setting in settings[:2]] == ["changed", "as it was"]
    assert not settings[2].exists()


def test_the_warden_has_nothing_to_do_after_a_good_end(real: Cgroup) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, real.path, "end"], capture_output=True, text=True, timeout=60, check=True
    )
    path, pid = done.stdout.split()
    assert not Path(path).exists() and not Path(f"/proc/{pid}").exists() and done.stderr == ""
