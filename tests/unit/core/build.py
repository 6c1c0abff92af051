# SPDX-License-Identifier: Apache-2.0
"""Histories by hand: a builder that numbers and times the records, and the four shipped experiments as they go on a
kernel that keeps every promise."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from chaos.experiment.load import load
from chaos.experiment.model import Experiment
from chaos.history.file import up_to_damage
from chaos.history.questions import ANYBODY, THE_DEAD, kind_of
from chaos.history.records import (
    Answer,
    Asked,
    Console,
    Counted,
    Done,
    End,
    Entered,
    Exited,
    Fault,
    Filled,
    Firmware,
    Header,
    Held,
    History,
    Invoke,
    Kernel,
    Note,
    Observation,
    Record,
    Released,
    Traced,
    Value,
)

SHIPPED = Path(__file__).parents[3] / "experiments" / "resilience"
CGROUPS = (".", "source", "destination")
STATUS: dict[str, Value] = {"handle": 1, "policy": 0, "state": 3}
KERNEL = "6.12.117"
R = TypeVar("R", bound=Record)


@cache
def shipped(name: str) -> Experiment:
    return load(SHIPPED / f"{name}.yaml")


class Builder:
    """Every record comes a millisecond after the one before, every system call takes a fifth of one."""

    def __init__(self, experiment: str = "by-hand", *, kernel: str = KERNEL, executes_es: bool = True) -> None:
        self.records: list[Record] = []
        self.t = 1_000_000_000
        self.ops = 0
        self.pids: dict[str, int] = {}
        self.add(
            Header(
                t=self.t,
                experiment=experiment,
                seed=7,
                host="lab",
                kernel=kernel,
                release=f"{kernel}-amd64",
                executes_es=executes_es,
                asids={"sev": 8, "sev_es": 7},
                log_ahead=0,
            )
        )

    def add(self, record: R) -> R:
        numbered: R = msgspec.structs.replace(record, seq=len(self.records))
        self.records.append(numbered)
        return numbered

    def tick(self) -> int:
        self.t += 1_000_000
        return self.t

    def invoke(self, f: str, agent: str, *, step: int = -1, **args: Value) -> Invoke:
        self.ops += 1
        pid = self.pids.get(agent, 0)
        return self.add(Invoke(t=self.tick(), op=self.ops, f=f, agent=agent, pid=pid, step=step, args=args))

    def done(
        self,
        invoke: Invoke,
        outcome: Literal["ok", "fail", "info"] = "ok",
        *,
        error: int = 0,
        firmware: int = 0,
        value: dict[str, Value] | None = None,
    ) -> Done:
        ended = 0 if outcome == "info" else self.tick()
        return self.add(
            Done(
                t=self.tick(),
                op=invoke.op,
                outcome=outcome,
                errno=error,
                firmware=firmware,
                began=ended and ended - 200_000,
                ended=ended,
                value=value or {},
            )
        )

    def do(self, f: str, agent: str, *, step: int = -1, error: int = 0, firmware: int = 0, **args: Value) -> Done:
        invoke = self.invoke(f, agent, step=step, **args)
        return self.done(invoke, "fail" if error else "ok", error=error, firmware=firmware)

    def spawn(self, agent: str, cgroup: str = "") -> Done:
        done = self.do("spawn", agent, cgroup=cgroup or agent)
        self.pids[agent] = 100 + len(self.pids)
        return done

    def launch(self, vm: str, agent: str, key: str = "", *, step: int = -1) -> None:
        """Create the VM, and give it a context unless `key` is empty."""
        self.do("create", agent, step=step, vm=vm, kind=key or "plain", vcpus=1, memory="guest")
        if not key:
            return
        self.do("init", agent, step=step, vm=vm, key=key)
        for f in ("launch_start", "launch_update_data", "launch_measure", "launch_finish"):
            self.do(f, agent, step=step, vm=vm)

    def offer(self, vm: str, *peers: str) -> None:
        """Create the peers at the destination, and send it a descriptor of the source's VM for each."""
        for peer in peers:
            self.launch(peer, "destination")
            self.do("connect", "source", vm=vm, peer=peer)
            self.do("send_fd", "source", vm=vm, to="destination")

    def status(self, vm: str, agent: str, *, step: int = -1, error: int = 0, firmware: int = 0) -> Done:
        invoke = self.invoke("guest_status", agent, step=step, vm=vm)
        if error:
            return self.done(invoke, "fail", error=error, firmware=firmware)
        return self.done(invoke, value=STATUS)

    def move(self, source: str, destination: str, agent: str, *, step: int = -1, error: int = 0) -> Done:
        return self.do("move", agent, step=step, error=error, vm=destination, source=source)

    def give_state(self, vm: str, agent: str, *differs: str, step: int = -1) -> Done:
        """The registers arrive, and are as they were given but for `differs`."""
        invoke = self.invoke("set_state", agent, step=step, vm=vm)
        return self.done(invoke, value={"vcpus": 1, "differs": list(differs)})

    def observe(
        self, label: str, charges: dict[str, int] | None = None, *, key: str = "sev", guests: int | None = None,
        step: int = -1, dying: int = 0,
    ) -> Observation:  # fmt: skip
        """`charges` by cgroup; the run's own is their sum, and so is `guests`, unless they are given."""
        charges = dict(charges or {})
        charges.setdefault(".", sum(charges.values()))
        misc = {
            cgroup: {"current": {k: charges.get(cgroup, 0) if k == key else 0 for k in ("sev", "sev_es")}}
            for cgroup in dict.fromkeys((*CGROUPS, *charges))
        }
        count = charges["."] if guests is None else guests
        t = self.tick()
        return self.add(
            Observation(
                t=t,
                until=t + 100_000,
                label=label,
                step=step,
                misc=misc,
                guests=count,
                dying=dying,
                pinned=5,
                vms={},
                objects={"kvm_vcpu": 0},
                references={"kvm_amd": 0, "ccp": 1},
                tables=0,
                dying_misc=0,
            )
        )

    def ask(
        self, vm: str, agent: str, *, dead: bool, step: int = -1, vcpus: int = 1, control: int = 0
    ) -> Asked:  # fmt: skip
        """Every question to every descriptor; those for the dead to the dead alone."""
        said = errno.EIO if dead else 0
        answers = tuple(
            Answer(fd=fd, ioctl=name, errno=said, control=control)
            for questions in (ANYBODY, THE_DEAD)[: 1 + dead]
            for fd in ("vm", *(f"vcpu {number}" for number in range(vcpus)), "device")
            for name in questions[kind_of(fd)]
        )
        return self.add(Asked(t=self.tick(), agent=agent, vm=vm, step=step, answers=answers, device=0))

    def count(self, vm: str, agent: str, ticks: int, *, step: int = -1, stale: int = 0) -> Counted:
        return self.add(
            Counted(t=self.tick(), vm=vm, agent=agent, step=step, where="registers", ticks=ticks, stale=stale)
        )

    def fill(self, label: str, sev: int = 8, sev_es: int = 7, *, dying: int = 0) -> Filled:
        full = {"sev": errno.EBUSY, "sev_es": errno.EBUSY}
        count = {"sev": sev, "sev_es": sev_es}
        return self.add(Filled(t=self.tick(), label=label, count=count, errno=full, dying=dying, dying_misc=dying))

    def hold(self, invoke: Invoke, *, step: int = -1, reached: bool = True) -> Held:
        """A move that waits for a vCPU."""
        return self.add(
            Held(
                t=self.tick(), op=invoke.op, step=step, hold="vcpu-running", reached=reached, state="D",
                sleeping="sev_lock_vcpus_for_migration", place="vcpu",
            )
        )  # fmt: skip

    def hold_at(self, invoke: Invoke, *, function: str = "", command: str = "") -> Held:
        """An operation at the entry of a kernel function, or while the firmware does not answer."""
        place: Literal["kernel", "firmware"] = "kernel" if function else "firmware"
        return self.add(
            Held(
                t=self.tick(), op=invoke.op, step=-1, hold="here", reached=True, state="D", sleeping="",
                place=place, function=function, command=command,
            )
        )  # fmt: skip

    def release(self, hold: str) -> Released:
        return self.add(Released(t=self.tick(), step=-1, hold=hold))

    def kill_begins(self, agent: str, *, step: int = -1) -> Fault:
        return self.add(Fault(t=self.tick(), fault="kill", event="apply", step=step, target=agent, ends=(agent,)))

    def kill(self, agent: str, *, step: int = -1, struck: bool = True) -> None:
        self.kill_begins(agent, step=step)
        self.exited(agent, -9)
        self.add(Fault(t=self.tick(), fault="kill", event="evidence", step=step, target=agent, struck=struck))

    def exited(self, agent: str, status: int = 0) -> Exited:
        return self.add(Exited(t=self.tick(), agent=agent, pid=self.pids.get(agent, 0), status=status))

    def exit(self, agent: str) -> None:
        self.do("exit", agent)
        self.exited(agent)

    def kernel(self, text: str, level: int = 4) -> Kernel:
        return self.add(Kernel(t=self.tick(), level=level, text=text))

    def console(self, text: str) -> Console:
        return self.add(Console(t=self.tick(), text=text))

    def traced(
        self, tid: int, function: str, event: Literal["enter", "leave"] = "enter", *, t: int = 0, **values: Value
    ) -> Traced:
        """At `t`, or now; events are often recorded late."""
        return self.add(Traced(t=t or self.tick(), event=event, function=function, tid=tid, values=values))

    def entered(self, vcpu: int, asid: int, generations: int = 1, shared: tuple[int, ...] = ()) -> Entered:
        return self.add(
            Entered(
                t=self.tick(), cpu=1, since=1, vcpu=vcpu, tids=(70 + vcpu,), asid=asid, generations=generations,
                shared=shared, count=9,
            )
        )  # fmt: skip

    def note(self, text: str, witness: Literal["", "log", "guests", "firmware", "events", "entries"] = "") -> Note:
        return self.add(Note(t=self.tick(), topic="witness", text=text, witness=witness))

    def begin(self) -> None:
        """What the runner does before the script."""
        self.fill("start")
        self.observe("start")
        self.spawn("source")
        self.spawn("destination")

    def finish(self, *, complete: bool = True, reason: str = "", watched: bool = False) -> History:
        """What the runner does after the script, and the history."""
        for agent in list(self.pids):
            if not any(isinstance(record, Exited) and record.agent == agent for record in self.records):
                self.exit(agent)
        self.observe("end")
        self.fill("end")
        if watched:
            self._watched()
        return self.end(complete=complete, reason=reason)

    def _watched(self) -> None:
        """What a lab's firmware says in the end: that each guest was started when it was, and has gone."""
        starts = [r.t for r in self.records if isinstance(r, Invoke) and r.f == "launch_start"]
        sent = [("LAUNCH_START", handle, t) for handle, t in enumerate(starts)]
        sent += [("DECOMMISSION", handle, self.tick()) for handle, _ in enumerate(starts)]
        for order, (command, handle, t) in enumerate(sent):
            self.add(Firmware(t=t, order=order, command=command, status=0, handle=handle))

    def end(self, *, complete: bool = True, reason: str = "") -> History:
        self.add(End(t=self.tick(), complete=complete, reason=reason))
        return self.history()

    def history(self) -> History:
        return History(tuple(self.records), up_to_damage(self.records).damage)


def moved(*, status_error: int = 0, ask_dead: bool = True) -> History:
    """move-across-cgroups; steps 0 to 10."""
    b = Builder("move-across-cgroups")
    b.begin()
    b.launch("old", "source", "sev", step=0)
    b.launch("new", "destination", step=1)
    b.do("run", "source", step=2, vm="old", every=1)
    b.count("old", "source", 100, step=3)
    b.status("old", "source", step=4)
    b.observe("before", {"source": 1}, step=5)
    _migrate(b, step=6)
    b.observe("after", {"destination": 1}, step=7)
    b.count("new", "destination", 203, step=8)
    b.status("new", "destination", step=9, error=status_error)
    b.ask("old", "source", dead=ask_dead, step=10)
    return b.finish(watched=True)


def two_owners() -> History:
    """After a move the source answers for the context too."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination")
    b.observe("after", {"destination": 1})
    b.status("new", "destination")
    b.status("old", "source")
    b.ask("old", "source", dead=True)
    return b.finish()


def guest_moved(*, registers: bool = True) -> Builder:
    """A guest that was counted and asked for its status, and was moved; the destination was given its registers."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.count("old", "source", 100)
    b.status("old", "source")
    b.move("old", "new", "destination")
    if registers:
        b.give_state("new", "destination")
    return b


def _migrate(b: Builder, *, step: int) -> None:
    b.do("connect", "source", step=step, vm="old", peer="new")
    b.do("connect", "destination", step=step, vm="new", peer="old")
    b.do("pause", "source", step=step, vm="old")
    b.do("get_state", "source", step=step, vm="old")
    b.do("send_fd", "source", step=step, vm="old", to="destination")
    b.move("old", "new", "destination", step=step)
    b.give_state("new", "destination", step=step)
    b.do("run", "destination", step=step, vm="new", every=1)
    b.do("commit", "destination", step=step, vm="new")


def moved_es() -> History:
    """move-across-cgroups-es in the lab, which cannot enter the guest; steps 0 to 7."""
    b = Builder("move-across-cgroups-es", executes_es=False)
    b.begin()
    b.launch("old", "source", "sev_es", step=0)
    b.launch("new", "destination", step=1)
    b.status("old", "source", step=2)
    b.observe("before", {"source": 1}, key="sev_es", step=3)
    b.do("send_fd", "source", step=4, vm="old", to="destination")
    b.move("old", "new", "destination", step=4)
    b.observe("after", {"destination": 1}, key="sev_es", step=5)
    b.status("new", "destination", step=6)
    b.ask("old", "source", dead=True, step=7, vcpus=2)
    return b.finish(watched=True)


def destination_killed() -> History:
    """kill-destination-in-move; steps 0 to 15."""
    b = Builder("kill-destination-in-move")
    invoke = _held(b, status=False)
    b.observe("held", {"source": 1, "destination": 1}, guests=1, step=7)
    b.kill("destination", step=8)
    b.done(invoke, "info")
    b.observe("after", {"source": 1}, step=10)
    b.count("old", "source", 900, step=11)
    b.do("pause", "source", step=12, vm="old")
    b.status("old", "source", step=13)
    b.ask("old", "source", dead=False, step=14)
    b.do("create", "source", step=15, vm="again", kind="mirror", vcpus=0, memory="guest")
    b.do("mirror", "source", step=15, vm="again", source="old")
    return b.finish(watched=True)


def source_killed() -> History:
    """kill-source-in-move; steps 0 to 12."""
    b = Builder("kill-source-in-move")
    invoke = _held(b, status=True)
    b.observe("held", {"source": 1, "destination": 1}, guests=1, step=8)
    b.kill("source", step=9)
    b.done(invoke)
    b.observe("after", {"destination": 1}, step=11)
    b.status("new", "destination", step=12)
    return b.finish(watched=True)


def _held(b: Builder, *, status: bool) -> Invoke:
    """Up to the hold of a move whose source is in the guest."""
    b.begin()
    b.launch("old", "source", "sev", step=0)
    b.launch("new", "destination", step=1)
    b.do("run", "source", step=2, vm="old", every=0)
    b.count("old", "source", 100, step=3)
    step = 4
    if status:
        b.status("old", "source", step=4)
        step = 5
    b.observe("before", {"source": 1}, step=step)
    if not status:
        b.status("old", "source", step=step + 1)  # no step asks for it: the runner does before any move
    b.do("send_fd", "source", step=step + 1, vm="old", to="destination")
    invoke = b.invoke("move", "destination", step=step + 1, vm="new", source="old")
    b.hold(invoke, step=step + 2)
    return invoke


ALL: dict[str, Callable[[], History]] = {
    "move-across-cgroups": moved,
    "move-across-cgroups-es": moved_es,
    "kill-destination-in-move": destination_killed,
    "kill-source-in-move": source_killed,
}


def changed(history: History, change: Callable[[Record], Record | None]) -> History:
    """The history with every record passed through `change`; one that becomes None is left out."""
    kept = [record for record in map(change, history.records) if record is not None]
    records = tuple(msgspec.structs.replace(record, seq=seq) for seq, record in enumerate(kept))
    return History(records, up_to_damage(records).damage)
