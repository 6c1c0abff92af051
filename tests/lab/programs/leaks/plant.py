# SPDX-License-Identifier: Apache-2.0
"""Leaks made on purpose, of every kind. An audit that does not see them shows nothing."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from chaos.kvm.sev import Platform, Sev
from chaos.kvm.system import System
from chaos.linux.fd import Mapping
from chaos.netns.link import LinkEnd, connect, remove
from chaos.netns.netem import Impairment, apply, undo
from chaos.netns.space import Namespace
from tests.lab.programs.leaks.audit import CGROUPS, CPUS, TRACING, contexts, leaked, look

Seen = dict[str, dict[str, dict[str, list[str]]]]


def planted(spared: Path) -> Seen:
    """By the name of the leak, what the audit saw while it was there and after it was gone."""
    before = look(spared) | contexts()
    seen: Seen = {}
    for name, leak in LEAKS.items():
        print(name, file=sys.stderr, flush=True)
        with leak():
            during = leaked(before, spared, within=0)
        seen[name] = {"during": during, "after": leaked(before, spared)}
    return seen


@contextlib.contextmanager
def _process() -> Iterator[None]:
    child = subprocess.Popen(["sleep", "600"])
    yield
    child.kill()
    child.wait()


@contextlib.contextmanager
def _unreaped() -> Iterator[None]:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    yield
    child.wait()


@contextlib.contextmanager
def _cgroup() -> Iterator[None]:
    (CGROUPS / "left").mkdir()
    yield
    (CGROUPS / "left").rmdir()


@contextlib.contextmanager
def _namespace() -> Iterator[None]:
    with Namespace.create():
        yield


@contextlib.contextmanager
def _qdisc() -> Iterator[None]:
    end = LinkEnd(_own_network(), "lo")
    apply(end, Impairment(delay_us=1))
    yield
    undo(end)


@contextlib.contextmanager
def _link() -> Iterator[None]:
    with _own_network() as space:
        connect(LinkEnd(space, "left"), LinkEnd(space, "right"))
        yield
        remove(LinkEnd(space, "left"))


def _own_network() -> Namespace:
    return Namespace(os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC))


@contextlib.contextmanager
def _socket() -> Iterator[None]:
    """In the hands of another process, which the audit's own are not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = subprocess.Popen(["sleep", "600"], pass_fds=[listener.fileno()])
    yield
    child.kill()
    child.wait()


@contextlib.contextmanager
def _file() -> Iterator[None]:
    path = Path("/dev/shm/left")
    path.touch()
    yield
    path.unlink()


@contextlib.contextmanager
def _instance() -> Iterator[None]:
    path = TRACING / "instances/left"
    path.mkdir()
    yield
    path.rmdir()


@contextlib.contextmanager
def _asid(key: str) -> Iterator[None]:
    system, platform = System.open(), Platform.open()
    vm = system.create_vm()
    sev = Sev(vm.fd.number, platform.fd.number)
    sev.es_init() if key == "sev_es" else sev.init()
    yield
    vm.close()
    platform.close()
    system.close()


@contextlib.contextmanager
def _guest() -> Iterator[None]:
    system, platform = System.open(), Platform.open()
    vm = system.create_vm()
    sev = Sev(vm.fd.number, platform.fd.number)
    sev.init()
    sev.launch_start(0)
    yield
    vm.close()
    platform.close()
    system.close()


@contextlib.contextmanager
def _page() -> Iterator[None]:
    """Of a guest whose VM somebody keeps open."""
    system, platform = System.open(), Platform.open()
    vm = system.create_vm()
    Sev(vm.fd.number, platform.fd.number).init()
    memory = Mapping.private(2 * mmap.PAGESIZE)
    memory.write(0, bytes(memory.size))  # 6.1 only reads them when it pins them, and the page of zeros never is
    vm.register_region(memory.start, memory.size)
    yield
    vm.close()
    platform.close()
    system.close()
    memory.close()


@contextlib.contextmanager
def _vm() -> Iterator[None]:
    """Whoever made it has closed it, and another process has the descriptor."""
    system = System.open()
    vm = system.create_vm()
    child = subprocess.Popen(["sleep", "600"], pass_fds=[vm.fd.number])
    vm.close()
    system.close()
    yield
    child.kill()
    child.wait()


@contextlib.contextmanager
def _device() -> Iterator[None]:
    system = System.open()
    yield
    system.close()


@contextlib.contextmanager
def _vcpu() -> Iterator[None]:
    """It keeps its VM, whose own descriptor is closed."""
    system = System.open()
    vm = system.create_vm()
    vcpu = vm.create_vcpu(0)
    vm.close()
    yield
    vcpu.close()
    system.close()


@contextlib.contextmanager
def _table() -> Iterator[None]:
    """Of a guest that has run: it says something to port 16 and leaves."""
    system = System.open()
    vm = system.create_vm()
    memory = Mapping.private(mmap.PAGESIZE)
    memory.write(0, b"\xe6\x10")
    vm.set_memory(0, 0, memory)
    vcpu = vm.create_vcpu(0)
    segments, registers = vcpu.sregs(), vcpu.regs()
    segments.cs.base = segments.cs.selector = registers.rip = 0
    registers.rflags = 2
    vcpu.set_sregs(segments)
    vcpu.set_regs(registers)
    vcpu.run()
    yield
    vcpu.close()
    vm.close()
    system.close()
    memory.close()


@contextlib.contextmanager
def _referred() -> Iterator[None]:
    """A cgroup that is removed while a VM that nobody in it has any more is charged to it."""
    group, home = CGROUPS / "left", CGROUPS / "cgroup.procs"
    group.mkdir()
    system, platform = System.open(), Platform.open()
    vm = system.create_vm()  # out here: on 6.1 KVM has a thread for it, which stays in the cgroup that this was done in
    (group / "cgroup.procs").write_text(str(os.getpid()))
    Sev(vm.fd.number, platform.fd.number).init()
    home.write_text(str(os.getpid()))
    group.rmdir()
    yield
    vm.close()
    platform.close()
    system.close()


@contextlib.contextmanager
def _cpu() -> Iterator[None]:
    switch = CPUS.parent / "cpu1/online"
    switch.write_text("0")
    yield
    switch.write_text("1")


@contextlib.contextmanager
def _controller() -> Iterator[None]:
    control = CGROUPS / "cgroup.subtree_control"
    there = "pids" in control.read_text()
    control.write_text("-pids" if there else "+pids")
    yield
    control.write_text("+pids" if there else "-pids")


LEAKS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "process": _process,
    "process that nobody reaps": _unreaped,
    "cgroup": _cgroup,
    "namespace": _namespace,
    "qdisc": _qdisc,
    "qdisc of a link": _link,
    "socket": _socket,
    "file": _file,
    "tracing": _instance,
    "asid of sev": lambda: _asid("sev"),
    "asid of sev_es": lambda: _asid("sev_es"),
    "charge": _guest,
    "page of a guest": _page,
    "vm in the hands of another process": _vm,
    "object: a vCPU": _vcpu,
    "reference: the device": _device,
    "table of a guest": _table,
    "cgroup that is removed and referred to": _referred,
    "setting: a CPU": _cpu,
    "setting: a controller": _controller,
}
"""By a name that begins with the kind which the audit must see."""
