# SPDX-License-Identifier: Apache-2.0
"""Our corner of tracefs: probes on the functions of a move, and an instance of the tracer for each runner.

    <tracefs>/kprobe_events             the probes, in the group `sevchaos`, the same for all runners of this host;
                                        what is only counted, in histograms, in the group `sevchaos_counted`
    <tracefs>/instances/sevchaos-<pid>-<n>
                                        a runner's: a buffer of its own, with those probes armed and nothing else

An instance is locked (flock) for as long as its owner lives, as a run's cgroup is, and the directory of all instances
while one is made or looked for. The last of ours takes the probes with it. A lab is saved with the probes made and not
armed: that takes a tenth of the time of a run.

A probe at the entry of a function takes its arguments from the registers of the x86-64 calling convention, one at its
end takes what it returned.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chaos.linux import kallsyms
from chaos.linux.fd import OwnedFd
from chaos.linux.flock import lock, locked

ROOT = Path("/sys/kernel/tracing")
GROUP = "sevchaos"
COUNTED = "sevchaos_counted"
_AT_ONCE = 64  # calls of one function, under way at once, whose ends are seen
_BUFFER_KB = 256  # of each CPU: some two thousand events, until they are read
_CGROUP_MADE = "cgroup/cgroup_mkdir"


class NoTracing(Exception):
    """This host's tracer cannot be used. Says why, in a line."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Shows each call of `function` when it is entered, or when it is left; `takes` says what is taken there."""

    function: str
    leaving: bool = False
    takes: str = ""

    @property
    def event(self) -> str:
        return f"{self.function}_{'leave' if self.leaving else 'enter'}"

    def definition(self, function: str) -> str:
        """As kprobe_events has it, on a function that goes by this name."""
        kind = f"r{_AT_ONCE}" if self.leaving else "p"
        return f"{kind}:{GROUP}/{self.event} {function} {self.takes}".rstrip()


_RETURNED = "returned=%ax:s32"
_CHARGE = "type=%di:u32 css=%si:x64 amount=%dx:u64"

# What is missing in Debian's kernels, because it is inlined, is not here: sev_migrate_from, sev_asid_new,
# kvm_vm_dead and sev_guest_init. What they do lies between two that are.
PROBES = (
    Probe("sev_vm_move_enc_context_from"),
    Probe("sev_vm_move_enc_context_from", leaving=True, takes=_RETURNED),
    Probe("sev_vm_copy_enc_context_from"),
    Probe("sev_vm_copy_enc_context_from", leaving=True, takes=_RETURNED),
    Probe("sev_lock_two_vms", leaving=True, takes=_RETURNED),
    Probe("misc_cg_try_charge", takes=_CHARGE),
    Probe("misc_cg_try_charge", leaving=True, takes=_RETURNED),
    Probe("sev_lock_vcpus_for_migration"),
    Probe("sev_lock_vcpus_for_migration", leaving=True, takes=_RETURNED),
    Probe("sev_unlock_vcpus_for_migration"),
    Probe("misc_cg_uncharge", takes=_CHARGE),
    Probe("sev_vm_destroy"),
    Probe("sev_asid_free"),
    Probe("misc_cg_alloc", leaving=True, takes="css=%ax:x64"),  # whose address is told nowhere else
)


class Instance:
    """A tracer of our own, not yet tracing. `missing` names the functions that no probe could be put on."""

    def __init__(self, path: Path, owner: OwnedFd, missing: tuple[str, ...]) -> None:
        self.path = path
        self.missing = missing
        self._lock = owner

    def write(self, name: str, text: str) -> None:
        """Raises OSError."""
        _write(self.path / name, text)

    def open(self, name: str) -> OwnedFd:
        """For reading, without waiting. Raises OSError."""
        return OwnedFd(os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))

    def missed(self) -> int:
        """How many calls probes of ours have not shown since they were made. Raises OSError."""
        ours = {probe.event for probe in PROBES}
        lines = (self.path.parents[1] / "kprobe_profile").read_text().splitlines()
        return sum(int(fields[2]) for fields in map(str.split, lines) if fields[0] in ours)

    def remove(self) -> None:
        """Nothing of it is open any more. Raises OSError."""
        root = self.path.parents[1]
        try:
            with _locked(root):
                _delete(self.path)
                _remove_probes(root)
        finally:
            self._lock.close()


def prepare(root: Path = ROOT) -> tuple[str, ...]:
    """Make the probes that are not there yet; the functions that none can be put on. Raises `NoTracing`."""
    with _available(root), _locked(root):
        return _prepare(root)


def make(root: Path = ROOT) -> Instance:
    """Raises `NoTracing`."""
    with _available(root), _locked(root):
        missing = _prepare(root)
        path = _create(root / "instances", f"{GROUP}-{os.getpid()}")
        instance = Instance(path, lock(path), missing)
        try:
            instance.write("tracing_on", "0")
            instance.write("trace_clock", "mono")  # CLOCK_MONOTONIC
            instance.write("buffer_size_kb", str(_BUFFER_KB))
            instance.write(f"events/{GROUP}/enable", "1")
            instance.write(f"events/{_CGROUP_MADE}/enable", "1")
        except BaseException:
            _delete(path)
            raise
        return instance


def make_counting(root: Path, event: str, definition: str) -> Instance:
    """One in which nothing is traced, with a probe of this name at the entry of a function, for `hist` triggers.
    `definition` is the function and what is taken there. Raises `NoTracing`."""
    line = f"p:{COUNTED}/{event} {definition}"
    with _available(root), _locked(root):
        if f"{COUNTED}/{event} " not in (root / "kprobe_events").read_text():
            _write(root / "kprobe_events", line)
        path = _create(root / "instances", f"{GROUP}-{os.getpid()}")
        return Instance(path, lock(path), ())


def clean(root: Path = ROOT) -> tuple[Path, ...]:
    """Remove what dead runners left: their instances. Raises OSError."""
    if not (root / "instances").is_dir():
        return ()
    removed = []
    with _locked(root):
        for path in _instances(root):
            with contextlib.suppress(BlockingIOError), lock(path):
                _delete(path)
                removed.append(path)
        _remove_probes(root)
    return tuple(removed)


@contextlib.contextmanager
def _available(root: Path) -> Iterator[None]:
    if not (root / "kprobe_events").exists():
        raise NoTracing(f"{root}/kprobe_events is not there: mount tracefs there, or use a kernel with kprobe events")
    try:
        yield
    except OSError as error:
        raise NoTracing(f"{error.filename}: {error.strerror}") from error


def _locked(root: Path) -> contextlib.AbstractContextManager[None]:
    """While one process makes or removes something, no other does."""
    return locked(root / "instances")


def _instances(root: Path) -> tuple[Path, ...]:
    return tuple(sorted((root / "instances").glob(f"{GROUP}-*")))


def _create(directory: Path, stem: str) -> Path:
    for number in itertools.count():
        path = directory / f"{stem}-{number}"
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError


def _delete(instance: Path) -> None:
    """With all that is in it: that is the kernel's."""
    instance.rmdir()


def _prepare(root: Path) -> tuple[str, ...]:
    """Make what is missing of the probes, and anew what an older version of us may have left."""
    lines = (root / "kprobe_events").read_text()
    there = {event: line for line, event in re.findall(rf"^([pr]\d*:{GROUP}/(\w+) .*)$", lines, re.MULTILINE)}
    symbols = functools.cache(kallsyms.kallsyms)
    missing = [probe.function for probe in PROBES if not _made(root, probe, there.get(probe.event, ""), symbols)]
    return tuple(dict.fromkeys(missing))


def _made(root: Path, probe: Probe, there: str, symbols: Callable[[], str]) -> bool:
    """Whether the probe is there, or could be made."""
    if there:
        if there == probe.definition(there.split()[1]):
            return True
        _write(root / "kprobe_events", f"-:{GROUP}/{probe.event}")
    if _make(root, probe, probe.function):
        return True
    return any(_make(root, probe, name) for name in kallsyms.copies(probe.function, symbols()))


def _make(root: Path, probe: Probe, function: str) -> bool:
    """Whether there is such a function, and a probe may be put on it."""
    try:
        _write(root / "kprobe_events", probe.definition(function))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):  # the kernel is locked down
            raise
        return False
    return True


def _remove_probes(root: Path) -> None:
    """Unless somebody's instance uses them."""
    if not _instances(root):
        for group in (GROUP, COUNTED):
            with contextlib.suppress(FileNotFoundError):
                _write(root / "kprobe_events", f"-:{group}/")


def _write(path: Path, text: str) -> None:
    """With one system call, and without truncating: that would remove the probes of others."""
    with OwnedFd(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)) as file:
        try:
            os.write(file.number, f"{text}\n".encode())
        except OSError as error:
            error.filename = str(path)
            raise
