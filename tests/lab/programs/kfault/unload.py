# SPDX-License-Identifier: Apache-2.0
"""The module at its edges: any bytes as commands, and taken out of a kernel that is using it."""

from __future__ import annotations

import errno
import os
import random
import select
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.errors import HostLacks
from chaos.linux.kfault import CONTROL, EVERY, Kfault, Refused
from tests.lab.programs.kfault.child import Child, Group, Vms

MODULE = os.environ.get("KFAULT_MODULE", "/lab/kfault.ko")
UNLOADS = int(os.environ.get("KFAULT_UNLOADS", "8"))


def insmod() -> None:
    subprocess.run(["insmod", MODULE], check=True, timeout=30)


def rmmod() -> float:
    """Seconds it took."""
    began = time.monotonic()
    subprocess.run(["rmmod", "kfault"], check=True, timeout=30)
    assert not CONTROL.exists()
    return time.monotonic() - began


def references() -> int:
    for line in Path("/proc/modules").read_text().splitlines():
        if line.startswith("kfault "):
            return int(line.split()[2])
    raise AssertionError("kfault is not loaded")


def any_bytes() -> dict[str, Any]:
    """Whatever is written is obeyed or refused, and the next proper command still works."""
    chance = random.Random(20)
    words = [b"hold", b"delay", b"return", b"release", b"clear", b"count", b"all", b"0", b"7", b"8", b"-1",
             b"misc_cg_uncharge", b"sev_init_vmcb", b"schedule", b"x" * 63, b"x" * 64, b"y" * 300, b"nth=0", b"nth=-1",
             b"nth=9223372036854775808", b"times=0", b"us=1", b"us=4294967296", b"value=-16", b"value=", b"=", b"=5",
             b"pid=0", b"pid=4294967297", b"pid=1", b"\0", b"\n", b"\r", b"%s%n", b"", b"nth", b"."]  # fmt: skip
    answers: Counter[str] = Counter()
    with Kfault.open() as kfault:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            if chance.random() < 0.2:
                text = chance.randbytes(chance.randrange(200))
            else:
                text = b" ".join(chance.choices(words, k=chance.randrange(1, 6)))
            try:
                taken = os.write(kfault.fd.number, text)
                assert 0 <= taken <= len(text)
                answers["taken"] += 1
            except OSError as error:
                answers[errno.errorcode[error.errno or 0]] += 1
            kfault.events()
        for size in (4096, 4097, 1 << 20):
            try:
                os.write(kfault.fd.number, b"z" * size)
            except OSError as error:
                answers[errno.errorcode[error.errno or 0]] += 1
    known = {"taken", "EINVAL", "EPERM", "ENOENT", "ENOSPC", "ESRCH", "E2BIG"}
    assert set(answers) <= known and answers["EINVAL"] > 100, answers
    with Kfault.open() as kfault:
        assert kfault.clear(kfault.hold("misc_cg_uncharge")) == 0
    return dict(answers)


def _init_again(vms: Vms) -> str:
    vms.init(vms.vms[0] if vms.vms else vms.create())
    return "charged"


def with_everybody_inside() -> dict[str, Any]:
    """rmmod while one task is held, one delayed, and threads wait in read, poll and epoll on a file that stays open."""
    with Child(_init_again) as held, Child(_init_again) as delayed, Kfault.open() as kfault:
        hold = kfault.hold("misc_cg_try_charge", pid=held.pid)
        wait = kfault.delay("misc_cg_try_charge", microseconds=600_000_000, pid=delayed.pid)
        held.go()
        delayed.go()
        # Two slots on one function: the first one armed sees a call first, and passes it on if it is not its own.
        kfault.wait_reached(hold, within=5)
        kfault.wait_reached(wait, within=5)

        silent = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
        watched = select.epoll()  # nobody waits in it, so nothing but the module can take the file out of it
        watched.register(silent, select.EPOLLIN)
        woken: dict[str, str] = {}
        threads = [threading.Thread(target=_wait, args=(woken, name, silent)) for name in ("read", "poll", "epoll")]
        for thread in threads:
            thread.start()
        time.sleep(0.3)  # no event tells that they sleep; were they late, the test would only be easier
        assert not woken and references() == 0
        took = rmmod()
        assert held.answer(5) == "charged" and delayed.answer(5) == "charged"
        for thread in threads:
            thread.join(5)
        watched.close()
        os.close(silent)
        insmod()
        try:
            kfault.events()
        except HostLacks:
            pass
        else:
            raise AssertionError("a file of the module before is of use to the module after")
    assert woken == {"read": "EIO", "poll": "woken", "epoll": "woken"}, woken
    return {"rmmod seconds": took}


def _wait(woken: dict[str, str], how: str, fd: int) -> None:
    if how == "read":
        try:
            woken[how] = repr(os.read(fd, 4096))
        except OSError as error:
            woken[how] = errno.errorcode[error.errno or 0]
    elif how == "poll":
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        woken[how] = "woken" if poll.poll(10_000) else "timed out"
    else:
        with select.epoll() as epoll:
            epoll.register(fd, select.EPOLLIN)
            woken[how] = "woken" if epoll.poll(10) else "timed out"


def _forever(stop: Path, once: Callable[[Vms], object]) -> Callable[[Vms], int]:
    def body(vms: Vms) -> int:
        rounds = 0
        while not stop.exists():
            try:
                once(vms)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            rounds += 1
        return rounds

    return body


def _live_and_die(vms: Vms) -> None:
    try:
        vms.init(vms.create())
    finally:
        vms.close()


class _Move:
    def __init__(self, groups: tuple[Group, Group]) -> None:
        self.groups = groups

    def __call__(self, vms: Vms) -> None:
        try:
            self.groups[0].join()
            vms.init(source := vms.create())
            self.groups[1].join()
            destination = vms.create()
            destination.create_vcpu(0).close()
            destination.move_context_from(source.fd.number)
        finally:
            vms.close()


def under_load() -> dict[str, Any]:
    """Loaded, armed, fired and taken out, again and again, while other processes charge, move and die. So many times,
    and until something was held: on a loaded machine what is armed may be gone before anybody comes by."""
    stop = Path("/run/kfault-stop")
    chance = random.Random(21)
    seen: Counter[str] = Counter()
    longest = 0.0
    with Group("load-full", sev_max="0") as full, Group("load-a") as here, Group("load-b") as there:
        bodies: list[tuple[Callable[[Vms], object], Group]] = [
            (_init_again, full),
            (_live_and_die, here),
            (_Move((here, there)), here),
        ]
        children = [Child(_forever(stop, once), group).go() for once, group in bodies]
        unloads, deadline = 0, time.monotonic() + 60
        while unloads < UNLOADS or (not seen["reached"] and time.monotonic() < deadline):
            unloads += 1
            owners = [Kfault.open() for _ in range(chance.randrange(1, 3))]
            for owner in owners:
                _arm_some(owner, chance)
            for _ in range(chance.randrange(5)):
                time.sleep(chance.random() * 0.02)
                owner = chance.choice(owners)
                os.write(owner.fd.number, b"release all")
                seen.update(event.what for event in owner.events())
            if chance.random() < 0.5:  # the orderly way; else they find out afterwards
                for owner in owners:
                    owner.close()
            assert references() == 0
            longest = max(longest, rmmod())
            for owner in owners:
                owner.close()
            insmod()
        stop.touch()
        rounds = [child.answer(20) for child in children]
        stop.unlink()
        for child in children:
            child.kill()
            assert child.ended()
        assert (full.charges(), here.charges(), there.charges()) == (0, 0, 0)
    assert all(count > 0 for count in rounds) and seen["reached"] > 0, (rounds, seen)
    return {"unloads": unloads, "rounds of the load": rounds, "longest rmmod, seconds": longest, **seen}


def _arm_some(owner: Kfault, chance: random.Random) -> None:
    functions = ["misc_cg_try_charge", "misc_cg_uncharge", "sev_init_vmcb", "sev_asid_free", "sev_lock_two_vms",
                 "sev_lock_vcpus_for_migration", "kvm_vm_release", "sev_vm_destroy"]  # fmt: skip
    for function in chance.sample(functions, chance.randrange(1, 4)):
        try:
            match chance.randrange(3):
                case 0:
                    owner.hold(function, times=EVERY, nth=chance.randrange(1, 4))
                case 1:
                    owner.delay(function, microseconds=chance.randrange(20_000), times=EVERY)
                case _:
                    owner.returns("misc_cg_try_charge", value=-errno.EBUSY, times=chance.randrange(1, 5))
        except Refused as error:
            raise AssertionError(f"{error}") from error


CHECKS = (any_bytes, with_everybody_inside, under_load)
