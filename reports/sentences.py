# SPDX-License-Identifier: Apache-2.0
"""Steps, answers and outcomes in words. Text out of a history is data: nothing in it may steer a terminal."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from chaos.errors import ExitCode
from chaos.experiment import model as e
from chaos.experiment import steps as s
from chaos.history.reading import NO_LENGTH
from chaos.history.records import (
    QUESTION,
    Asked,
    Counted,
    Done,
    Fault,
    Handover,
    Held,
    History,
    Invoke,
    Note,
    Stormed,
    Traced,
)
from chaos.history.sweeps import swept
from chaos.judge.findings import Finding, elsewhere, matching
from chaos.judge.timeline import During, named, told
from chaos.judge.verdict import Outcome, RunVerdict, Tally, Verdict
from chaos.kinds import Kind
from chaos.promises import PROMISES

FEW = 6  # operations of one step of which each is told by itself
EVENTS = 16  # so many of a verdict's are shown


def clean(text: str) -> str:
    """The text with everything that does not print replaced."""
    return "".join(char if char.isprintable() else "�" for char in text)


def errname(number: int) -> str:
    return errno.errorcode.get(number, f"errno {number}") if number else "ok"


def accepted(verdict: Verdict) -> str:
    """Why the verdict does not count: "broken (known: finding 0001: ...), not counted"."""
    known = "known: " if verdict.outcome is Outcome.BROKEN else ""
    return f"{verdict.outcome.value} ({known}{clean(verdict.accepted)}), not counted"


def unlisted(verdict: Verdict) -> str:
    """Why an unknown or a skip does not count: "unknown (not put to the test), not counted"."""
    return f"{verdict.outcome.value} (not put to the test), not counted"


def result_of(code: ExitCode, tally: Tally) -> str:
    """The last line of a report: what it comes to, how many promises ended how, and the exit code.

    "all kept" only if all are: where something was skipped or accepted, nothing more is known than that nothing
    counted against the kernel.
    """
    unseen = tally.skipped + tally.partly_skipped + tally.accepted_broken + tally.accepted_unknown
    said = {
        ExitCode.KEPT: "nothing counted against it" if unseen else "all kept",
        ExitCode.BROKEN: "broken",
        ExitCode.UNKNOWN: "unknown" if tally.kept else "unknown, nothing was kept",
        ExitCode.SKIPPED: "skipped",
        ExitCode.UNCLEAN: "something was left on the host",
    }[code]
    parts = ((tally.kept, "kept"), (tally.broken, "broken"), (tally.unknown, "unknown"), (tally.skipped, "skipped"),
             (tally.partly_skipped, "skipped in part"), (tally.accepted_broken, "broken as known"),
             (tally.accepted_unknown, "unknown as stated"))  # fmt: skip
    counted = ", ".join(f"{number} {what}" for number, what in parts if number) or "no promise was judged"
    return f"{said}; {counted}; exit code {int(code)}"


def title(verdict: RunVerdict) -> str:
    """What was run and where: "move-across-cgroups on 6.12.117 (lab)"."""
    return clean(f"{verdict.experiment} on {verdict.kernel or 'an unknown kernel'} ({verdict.host or 'unknown host'})")


def promise(verdict: Verdict) -> str:
    """The promise by number and words: "P4 one owner: exactly one VM owns the context"."""
    return clean(f"{verdict.promise} {PROMISES.get(verdict.promise, '')}".strip())


def details(verdict: Verdict, history: History, known: Sequence[Finding] = ()) -> Iterator[str]:
    """What a deviation rests on, in lines, and what to call an unknown that has a name. Of the written findings `known`
    the one is pointed out that it is, or would be on other versions of the kernel."""
    if verdict.outcome is Outcome.BROKEN:
        yield clean(f"expected: {verdict.expected}; seen: {verdict.seen}; signature: {verdict.signature}")
        yield f"rests on records {', '.join(map(str, verdict.records))} of the history"
        yield from _events(verdict, history)
    elif verdict.signature:
        yield clean(f"signature: {verdict.signature}")
    kernel = history.header.kernel if history.header is not None else ""
    finding, other = matching(verdict, kernel, known), elsewhere(verdict, kernel, known)
    if finding is not None and not verdict.accepted:
        yield f"this is {finding}; see {finding.document}. with --accept-known it is not counted"
    if other is not None:
        yield f"this is {other}, known, but not on this version: {versions(other)}; see {other.document}. it is counted"


def versions(finding: Finding) -> str:
    """Which kernels have it: "6.1 from 6.1.192, 6.12 from 6.12.117 and before 6.12.130"."""
    told = ((name, of.first, f" and before {of.fixed}" if of.fixed else "") for name, of in finding.kernels.items())
    return ", ".join(f"{name} from {first}{before}" for name, first, before in told)


def _events(verdict: Verdict, history: History) -> Iterator[str]:
    """What the kernel's tracer saw, of what the verdict rests on: "57: move of new entered misc_cg_try_charge (…)"."""
    events = [record for record in history.records if isinstance(record, Traced) and record.seq in verdict.records]
    during = During(history)
    for event in sorted(events[:EVENTS], key=lambda event: event.t):
        invoke = during.made(event)
        yield clean(f"{event.seq}: {named(invoke) if invoke is not None else f'thread {event.tid}'} {told(event)}")
    if len(events) > EVENTS:
        yield f"and {len(events) - EVENTS} events more"


def step(experiment: e.Experiment, number: int) -> str:
    """A step of the script as a sentence."""
    return _sentence(experiment, experiment.script[number])


def _sentence(experiment: e.Experiment, do: s.Step) -> str:  # noqa: PLR0911, PLR0912 - a table
    match do:
        case s.LaunchStep():
            return _launch(experiment, do.vm)
        case s.RunStep():
            how = f"reporting every {do.every} ticks" if do.every > 1 else "reporting every tick"
            return f"let {do.vm} run, {how if do.every else 'without ever leaving the guest'}"
        case s.CountStep():
            return f"wait until {do.vm} has counted {do.ticks} further, and read its counter"
        case s.PauseStep():
            return f"bring the vCPUs of {do.vm} out of the guest"
        case s.StormStep():
            return f"let {do.threads} threads of ioctls loose on {do.vm}: {', '.join(do.calls)}"
        case s.CalmStep():
            return f"end the storm on {do.vm}"
        case s.FinishStep():
            return f"finish the launch of {do.vm}"
        case s.MirrorStep():
            return f"{_operation(do)}, whose context it shares"
        case s.MigrateStep():
            return _migrate(experiment, do)
        case s.MoveStep():
            waiting = "" if do.wait else ", and go on while it is under way"
            return f"{_operation(do)}{waiting}"
        case s.TogetherStep():
            meanwhile = "; ".join(_sentence(experiment, inner) for inner in do.meanwhile)
            together = "; ".join(_operation(inner) for inner in do.steps)
            return f"at one moment: {together}" + (f"; meanwhile {meanwhile}" if meanwhile else "")
        case s.JoinStep():
            return f"wait for the operation on {do.vm} to end"
        case s.HoldStep():
            return f"wait until the operation on {do.vm} is stopped in the kernel ({do.at})"
        case s.AskStep():
            return f"ask every descriptor of {do.vm}, in its own process, whether it is dead"
        case s.StatusStep():
            return f"ask the firmware for the status of {do.vm}'s context"
        case s.ObserveStep():
            return f"read every counter, as {do.label!r}"
        case s.FaultStep():
            options = "".join(f" {key}={value}" for key, value in do.options.items())
            return f"apply the fault {do.fault}{options} to {do.target or 'the host'}"
        case s.UndoStep():
            return f"undo the fault {do.fault} of {do.target or 'the host'}"
        case s.CreateStep():
            return f"create {do.vm}, and nothing more"
        case s.InitStep():
            return f"{_init(do)} of {do.vm}" + ("" if do.wait else ", and go on while it is under way")
        case s.VcpuStep():
            return f"create vCPU {do.id} of {do.vm}"
        case s.CommandStep():
            return f"give {do.vm} the SEV commands {do.ids}, without data"
        case s.DebugStep():
            return _debug(do)
        case s.PlatformStep():
            return _platform(do)
        case s.CallStep():
            how = " with arguments that the kernel may not write" if do.read_only else ""
            return f"{do.operation} of {do.vm}{how}" + ("" if do.wait else ", and go on while it is under way")
        case s.IrqfdStep() | s.IoeventfdStep() | s.SignalStep() | s.InterruptsStep() | s.MemslotStep():
            return _interrupts(do)
        case s.ArmStep():
            return f"prepare the hold {do.hold}: {_place(do)}"
        case s.ReleaseStep():
            return f"let what is stopped at {do.hold} go on"
        case s.SweepStep():
            round_, refused = (
                "; ".join(_sentence(experiment, each) for each in inner)
                for inner in ((*do.before, do.step, *do.after), do.refused)
            )
            told = f"let each of the kernel's fault points in {do.swept} fail once, a round each: {round_}"
            return told + (f"; after a refusal: {refused}" if refused else "")
        case s.ReloadStep():
            given = "".join(f", {name}={value}" for name, value in do.ccp.items())
            return f"end every VMM, load kvm_amd and ccp anew{given}, and start the VMMs again"
        case s.CloseStep():
            return f"close every descriptor of {do.vm}"


def _interrupts(do: s.IrqfdStep | s.IoeventfdStep | s.SignalStep | s.InterruptsStep | s.MemslotStep) -> str:
    match do:
        case s.IrqfdStep():
            act, to = ("bind", "to") if do.assign else ("take", "from")
            return f"{act} the eventfds of GSI {do.gsis} {to} {do.vm}"
        case s.IoeventfdStep():
            return f"{'have' if do.assign else 'no more have'} eventfds signalled by ports {do.ports} of {do.vm}"
        case s.SignalStep():
            return f"write the eventfds of GSI {do.gsis}"
        case s.InterruptsStep():
            return f"read which interrupts {do.vm} was sent"
    return f"{'give' if do.there else 'take'} memory slot {do.slot} {'to' if do.there else 'from'} {do.vm}"


def _migrate(experiment: e.Experiment, do: s.MigrateStep) -> str:
    tries = f", in up to {do.attempts} attempts" if do.supervise == "retry" else ""
    said = f"hand {do.source} over to {do.destination}: state, descriptor, move, resume{tries}"
    for phase, steps in do.before.items():
        said += f"; before {phase}, {', '.join(_sentence(experiment, inner) for inner in steps)}"
    return said


def _operation(do: s.MoveStep | s.MirrorStep | s.MovesStep) -> str:
    match do:
        case s.MovesStep():
            threads = f" by {do.threads} threads" if do.threads > 1 else ""
            return f"{do.rounds} rounds of moves into {do.destination} from {', '.join(do.sources)}{threads}"
        case s.MirrorStep():
            return f"make {do.vm} a mirror of {_taken(do)}"
    return f"move the context of {_taken(do)} into {do.destination}"


def _taken(do: s.TakingStep) -> str:
    """What a move or a mirror is given: "old", "a wrong descriptor (pipe), with flags 0x1"."""
    flags = f", with flags {do.flags:#x}" if do.flags else ""
    return (do.source or f"a wrong descriptor ({do.fd})") + flags


def _debug(do: s.DebugStep) -> str:
    if len(do.each) > 1:
        return f"{do.operation} of {do.vm}, {len(do.each)} times"
    ((read_at, write_at, length),) = do.each
    return f"{do.operation} of {do.vm}: {length} bytes from {read_at:#x} to {write_at:#x}"


def _platform(do: s.PlatformStep) -> str:
    told = f", whose buffer is said to be {do.length} bytes long" if do.command not in NO_LENGTH else ""
    chain = f" and the one for the chain {do.chain}" if do.command == "PDH_CERT_EXPORT" else ""
    return f"have {do.vmm} send {do.command} to /dev/sev{told}{chain}"


def _init(do: s.InitStep) -> str:
    given = ((name, getattr(do, name)) for name in ("flags", "features", "ghcb"))
    arguments = "".join(f", {name} {value:#x}" for name, value in given if value)
    return f"{do.command or 'init'}{arguments}" + (f" with every bit of {do.each} alone" if do.each else "")


def _place(arm: s.ArmStep) -> str:
    if arm.kernel is not None:
        whose = f" of {arm.kernel.vmm}" if arm.kernel.vmm else ""
        return f"call {arm.kernel.nth}{whose} of the kernel's {arm.kernel.function}"
    if arm.firmware is not None:
        return f"{arm.firmware.command} number {arm.firmware.nth} is not answered"
    assert arm.page is not None
    return f"the arguments of the next SEV command on {arm.page.vm} are not there"


def _launch(experiment: e.Experiment, name: str) -> str:
    vm = experiment.vms[name]
    cgroup = experiment.vmms[vm.vmm].cgroup
    vcpus = f"{vm.vcpus} vCPU{'s' if vm.vcpus > 1 else ''}"
    what = "an empty VM" if vm.kind is Kind.PLAIN else f"a {vm.kind.value.upper()} guest"
    return f"launch {name}: {what} with {vcpus}, by the VMM {vm.vmm} in cgroup {cgroup!r}"


def result(experiment: e.Experiment, history: History, number: int) -> str:
    """What came of a step, "" if there is nothing to say but that it was done."""
    records = [record for record in history.records if getattr(record, "step", -1) == number]
    if not records:
        # Some steps leave no record of their own. Teardown does, under a number behind the script's last.
        steps = (getattr(record, "step", -1) for record in history.records)
        last = max((step for step in steps if step < len(experiment.script)), default=-1)
        complete = history.end is not None and history.end.complete
        return "not reached" if number > last and not complete else ""
    do = experiment.script[number] if number < len(experiment.script) else None
    if isinstance(do, s.SweepStep):  # what was seen in each round is in the tables below
        said = [_swept(history, number, do)]
    else:
        said = list(_results([r for r in records if not isinstance(r, Invoke)]))
    said += _answers(history, [r for r in records if isinstance(r, Invoke) and r.phase != QUESTION])
    return ", ".join(dict.fromkeys(said))


def _swept(history: History, number: int, do: s.SweepStep) -> str:
    found = swept(history, number, *do.operation)
    points = " or ".join(map(str, sorted({*found.counts}))) or "nobody knows how many"
    return (
        f"{points} fault points: {len(found.failed)} failed, for {len(found.refused) or 'none'} of them it was refused"
    )


def _results(records: Sequence[object]) -> Iterator[str]:
    for record in records:
        match record:
            case Held():
                where = f" in {clean(record.sleeping)}" if record.sleeping else ""
                yield f"reached: state {clean(record.state)}{where}" if record.reached else "not reached in time"
            case Counted():
                yield f"{record.ticks} ticks" + (f", {record.stale} stale" if record.stale else "")
            case Asked():
                yield asked(record)
            case Fault(event="withheld"):
                yield "withheld"
            case Stormed():
                yield stormed(record)
            case Handover():
                yield handed_over(record)
            case Fault(event="evidence"):
                yield "struck" if record.struck else "nothing shows that it struck"
            case Note():
                yield clean(record.text)


def _answers(history: History, invokes: Iterable[Invoke]) -> Iterator[str]:
    """What failed, was killed or never answered; of a move also that it succeeded. Of many of a kind, how many."""
    answers = {record.op: record for record in history.records if isinstance(record, Done)}
    told = [answer for invoke in invokes for answer in _answer(invoke, answers.get(invoke.op))]
    if len(told) <= FEW:
        yield from (f"{text}{of}" for text, of in told)
        return
    for text, number in Counter(text for text, _ in told).items():
        yield f"{number} times: {text}" if number > 1 else text


def _answer(invoke: Invoke, done: Done | None) -> Iterator[tuple[str, str]]:
    """At most one: what came of it, and of which system call."""
    if done is None:
        yield f"{invoke.f} never answered", ""
    elif done.outcome == "info":
        yield f"{invoke.f} was killed", ""
    elif done.outcome == "fail":
        firmware = f" (firmware status {done.firmware:#x})" if done.firmware else ""
        call = done.value.get("call", "")
        of = f", of {clean(call)}" if isinstance(call, str) and call else ""
        yield f"{invoke.f} failed: {errname(done.errno)}{firmware}", of
    elif invoke.f == "move":
        yield f"moved{_between(invoke)}", ""
    elif invoke.f == "interrupts":
        vectors = done.value.get("vectors")
        told = ", ".join(map(str, vectors)) if isinstance(vectors, list) else ""
        yield f"{_argument(invoke, 'vm')} was sent {told or 'none'}", ""
    elif invoke.f == "moves":
        told = ", ".join(f"{clean(answer)} {count}" for answer, count in done.value.items())
        yield f"moves into {_argument(invoke, 'vm')}: {told}", ""


def _between(invoke: Invoke) -> str:
    """Of a move in a loop which it was: there are several."""
    return f" {_argument(invoke, 'source')} into {_argument(invoke, 'vm')}" if "of" in invoke.args else ""


def _argument(invoke: Invoke, key: str) -> str:
    return clean(str(invoke.args.get(key, "")))


def asked(record: Asked) -> str:
    """The answers of a VM in a line: "19 of 19 EIO (VM beside it: none)"."""
    total = len(record.answers)
    dead = [answer for answer in record.answers if answer.errno == errno.EIO and not answer.firmware]
    control = sum(answer.control == errno.EIO for answer in record.answers)
    return f"{len(dead)} of {total} EIO (VM beside it: {control or 'none'})"


def stormed(record: Stormed) -> str:
    """A storm in a line: "81211 calls of 8 threads, 40180 EIO"."""
    refused = sum(thread.errnos.get("EIO", 0) for thread in record.threads)
    return f"{sum(thread.calls for thread in record.threads)} calls of {len(record.threads)} threads, {refused} EIO"


def handed_over(record: Handover) -> str:
    """How an attempt ended, in a line: "aborted in send-fd (...)", "attempt 2: committed, stood still for 12.3 ms"."""
    said = f"attempt {record.attempt}: " if record.attempt > 1 else ""
    said += record.outcome if record.outcome == "committed" else f"{record.outcome} in {clean(record.phase)}"
    if record.why:
        said += f" ({clean(record.why)})"
    return said + (f", stood still for {max(record.stood) / 1e6:.1f} ms" if record.stood else "")


def by_errno(record: Asked) -> Iterator[tuple[str, str]]:
    """(errno, ioctls) of a VM's answers, for when they are not all the same."""
    groups: dict[str, list[str]] = {}
    for answer in record.answers:
        groups.setdefault(errname(answer.errno), []).append(f"{clean(answer.fd)} {clean(answer.ioctl)}")
    for name, ioctls in sorted(groups.items(), key=lambda group: (group[0] != "EIO", group[0])):
        yield name, ", ".join(ioctls)
