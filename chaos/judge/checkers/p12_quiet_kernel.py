# SPDX-License-Identifier: Apache-2.0
"""P12, a quiet kernel: no WARN, oops, lockdep report, hung task or panic, whatever userspace does.

The kernel reports its own defects in fixed words, given below with where they come from. An ordinary warning
(a clock marked unstable, a device that answers late, "unchecked MSR access", a firmware command that timed out) is a
message to an administrator and does not count, nor does what userspace brings upon itself ("traps: … general protection
fault"). The level is not asked: the line of an oops and the text of a WARN have the kernel's default one, which is 4
(KERN_WARNING) on most kernels and whatever CONFIG_MESSAGE_LOGLEVEL_DEFAULT and kernel.printk say on others. Of the
serial console only what the log does not have is looked at. That the log was read shows in the header: its reader heard
a line of its own.

What hangs is reported after a time of the kernel's, and never if it ends before: the verdict says what a run was too
short to see. A task that a hold or the firmware kept asleep on purpose is put down to that (`hung_task`), and what hung
while the machine under the lab stood still, to that (`machine_stalls`). A report from between two runs is nobody's, so
this run does not answer for it and is not kept either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from chaos.experiment.model import Experiment
from chaos.history.records import Console, History, Invoke, Kernel
from chaos.judge.evidence import RunEvidence
from chaos.judge.finding_counters import below_zero
from chaos.judge.hung_task import cannot_tell, hung, kept_asleep
from chaos.judge.machine_stalls import began, explained
from chaos.judge.parts import broken, combine, kept, unknown
from chaos.judge.timeline import named
from chaos.judge.verdict import Verdict

PROMISE = "P12"

# Name, pattern, reason. The first that matches names the record; a group `at` names the place in the signature.
TIMED = frozenset({"hung-task", "lockup", "stall"})
"""What is reported because nothing happened for too long."""

PATTERNS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    (
        "lockdep",
        re.compile(
            r"WARNING: (?:possible (?:circular|recursive|irq lock inversion)|inconsistent lock state|bad unlock balance"
            r"|bad contention|chain_key collision|suspicious RCU usage|held lock freed|lock held when returning"
            r"|[Nn]ested lock|circular locking deadlock|\S+-safe -> \S+-unsafe|.* still has locks held)"
            r"|BUG: (?:MAX_LOCK|MAX_STACK_TRACE_ENTRIES|key \S+ (?:not in|has not been))"
            r"|INFO: trying to register non-static key"
        ),
        "kernel/locking/lockdep.c and rcu's lockdep reports; lockdep turns itself off after one",
    ),
    (
        "warn",
        re.compile(r"WARNING: (?:CPU: \d+ PID: \d+ at )?\S+:\d+ (?:at )?(?P<at>[\w.]+)"),
        "__warn() of kernel/panic.c; from 6.16 on without CPU and PID in front",
    ),
    ("warn", re.compile(r"WARNING: CPU: \d+ PID: \d+ at (?P<at>\S+)"), "the same without a source file to name"),
    (
        "sanitizer",
        re.compile(
            r"BUG: (?:KASAN|KMSAN|KCSAN|KFENCE): .*? in (?P<at>[\w.]+)|(?:UBSAN|KASAN): (?P<kind>[\w-]+)"
            r"|(?P<cfi>CFI failure) at"
        ),
        "mm/kasan, mm/kmsan, kernel/kcsan, mm/kfence, lib/ubsan.c, kernel/cfi.c, where a kernel has them",
    ),
    (
        "slub",
        re.compile(r"\bBUG (?P<at>\S.*?) \((?:Not tainted|Tainted: [^)]*)\): |\bFIX (?P<fix>\S+): "),
        "slab_bug() and slab_fix() of mm/slub.c: no colon behind BUG, but the cache and how the kernel is tainted",
    ),
    (
        "slub",
        re.compile(r"Object already free|Objects remaining(?: in (?P<at>\S+))?|Slab cache still has objects"),
        "mm/slub.c and mm/slab_common.c, where it stands in a line of its own",
    ),
    (
        "usercopy",
        re.compile(r"usercopy: Kernel memory (?:exposure|overwrite) attempt detected"),
        "usercopy_abort() of mm/usercopy.c, before its BUG()",
    ),
    (
        "refcount",
        re.compile(r"refcount_t: (?P<at>saturated|addition on 0|underflow|decrement hit 0|unknown saturation)"),
        "lib/refcount.c, before the WARNING of it",
    ),
    (
        "object",
        re.compile(r"ODEBUG: (?:(?P<at>[a-z][a-z ]*?) \(?active|object \S+ (?P<on>is (?:NOT )?on stack))"),
        "lib/debugobjects.c, before the WARNING of it",
    ),
    ("lockup", re.compile(r"BUG: soft lockup|hard LOCKUP|BUG: workqueue lockup"), "kernel/watchdog.c, workqueue.c"),
    (
        "hung-task",
        re.compile(r"INFO: task .+ blocked (?:in I/O wait )?for more than \d+ seconds"),
        "kernel/hung_task.c",
    ),
    (
        "stall",
        re.compile(r"rcu.*(?:detected stalls?(?: on|,)|self-detected stall|detected expedited stalls)"),
        "kernel/rcu/tree_stall.h; the last two words differ by kind",
    ),
    ("bug", re.compile(r"kernel BUG at (?P<at>\S+?):?\d*!"), "BUG() of lib/bug.c and arch/x86/kernel/traps.c"),
    ("corruption", re.compile(r"(?P<at>list_(?:add|del)) (?:double add|corruption)"), "lib/list_debug.c"),
    (
        "gpf",
        re.compile(r"(?<!\] )general protection fault(?! ip:)"),
        "die_addr() of arch/x86/kernel/dumpstack.c, before the oops; that of a program has its name and ip",
    ),
    (
        "bug",
        re.compile(r"\bBUG: (?P<at>[A-Za-z][A-Za-z ]*?)(?: (?:in|for|at|on) |[^A-Za-z ]|$)"),
        "bad page, scheduling while atomic, NULL dereference, …, without the address or process it is about",
    ),
    (
        "oops",
        re.compile(r"\bOops\b|(?:: [0-9a-f]{4} \[#\d+\])|Unable to handle kernel"),
        "__die_header() of arch/x86/kernel/dumpstack.c: code and count behind whatever the trap is called",
    ),
    ("panic", re.compile(r"Kernel panic - not syncing"), "panic() of kernel/panic.c"),
)


def check(experiment: Experiment, history: History) -> Verdict:
    lines = [record for record in history.records if isinstance(record, Kernel | Console)]
    evidence = RunEvidence(history)
    parts = [unknown(PROMISE, f"a witness was lost: {note.text}", (note,)) for note in evidence.lost_of("log")]
    header = history.header
    if header is None or header.log_ahead is None:
        parts.append(unknown(PROMISE, "nothing shows that the kernel's log was read"))
    put_down: list[Verdict] = []
    seen: set[tuple[str, int | None]] = set()
    for line in lines:
        name, task = report(line), hung(line)
        if not name:
            continue
        if header is not None and line.t < header.t:
            text = f"before this run, after an earlier one had closed the log, the kernel said: {line.text}"
            parts.append(unknown(PROMISE, text, (line,)))
            continue
        reason, lost = kept_asleep(evidence, line), cannot_tell(experiment, evidence, line)
        # khungtaskd reports a task anew whenever it looks: the first time says it.
        if task is not None and (reason or lost, task) in seen:
            continue
        seen.add((reason or lost, task))
        if name in TIMED and not reason:
            machine, whole = explained(evidence, line)
            reason = machine if whole else ""
            lost = f"For a part of that time it may be {machine}" if machine and not whole else lost
        if name in TIMED and not reason and header is not None and header.earlier and began(evidence, line) < header.t:
            lost = "That had begun before this run, in which another was carried out on this kernel"
        if reason:
            put_down.append(kept(PROMISE, f"{line.text} That is put down to {reason}", (line,)))
        elif lost:
            parts.append(unknown(PROMISE, f"the kernel said: {line.text} {lost}", (line,)))
        else:
            parts.append(_reported(evidence, line, name))
    if not parts:
        text = f"{len(lines)} lines in the kernel's log, none of them a report of a defect"
        if put_down:
            text = f"{len(lines)} lines in the kernel's log, no other of them a report of a defect"
        parts = [kept(PROMISE, f"{text}; {_unseen(history)}", lines)]
    return combine(PROMISE, [*parts, *put_down])


def _reported(evidence: RunEvidence, line: Kernel | Console, name: str) -> Verdict:
    under_way = evidence.during.at(line.t)
    when = f" (during {', '.join(map(named, under_way))})" if under_way else ""
    return broken(
        PROMISE,
        f"the kernel said: {line.text}{when}",
        (line, *under_way),
        signature=_signature(evidence, name, under_way),
        expected="a quiet kernel",
        seen=line.text,
    )


def _unseen(history: History) -> str:
    """What could not have been seen: a hang that this kernel reports later than the run was long, or never."""
    header = history.header
    if header is None or not header.patience:
        return "after how long this kernel reports what hangs was not recorded"
    took = (history.records[-1].t - header.t) / 1_000_000_000
    late = [f"{what}s (after {after} s)" for what, after in header.patience.items() if after > took]
    never = [f"{what}s" for what, after in header.patience.items() if after == 0]
    told = f"in {took:.0f} s this kernel cannot report {', '.join(late)}" if late else ""
    nothing = f"it never reports {' or '.join(never)}" if never else ""
    return " and ".join(text for text in (told, nothing) if text) or "whatever hung for long would have been reported"


def _signature(evidence: RunEvidence, name: str, under_way: Sequence[Invoke]) -> str:
    """A warning comes out of the very call that met its condition, and the same one may be given for many reasons: a
    counter below zero, for one. So it is of another kind in another operation, and in a move that makes one so by a
    finding. The other reports may come late."""
    across = {invoke.op: "-across" * below_zero(evidence, invoke) for invoke in under_way}
    kinds = sorted({f"{evidence.kind(invoke)}{across[invoke.op]}" for invoke in under_way})
    return f"{name}-in-{'-and-'.join(kinds)}" if kinds and name.startswith("warn:") else name


def report(line: Kernel | Console) -> str:
    """What kind of defect the line reports, like "warn:misc_cg_cancel_charge", "" if none."""
    for name, pattern, _ in PATTERNS:
        found = pattern.search(line.text)
        if found:
            places = [value for value in found.groupdict().values() if value]
            return f"{name}:{'-'.join(places[0].split())}" if places else name
    return ""
