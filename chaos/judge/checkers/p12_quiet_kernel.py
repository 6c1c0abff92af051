# SPDX-License-Identifier: Apache-2.0
"""P12, a quiet kernel: no WARN, oops, lockdep report, hung task or panic, whatever userspace does.

The kernel reports its own defects in fixed words, given below with where they come from. An ordinary warning
(a clock marked unstable, a device that answers late, "unchecked MSR access", a firmware command that timed out) is a
message to an administrator and does not count. Only levels 0 to 4 (KERN_WARNING) do: what userspace brings upon
itself, a SIGSEGV for one, is logged at 6. Of the serial console only what the log does not have is looked at; it shows
those levels and no others. That the log was read shows in the header: its reader heard a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from chaos.experiment.model import Experiment
from chaos.history.records import Console, History, Invoke, Kernel
from chaos.judge.evidence import RunEvidence
from chaos.judge.finding_counters import below_zero
from chaos.judge.parts import broken, combine, kept, unknown
from chaos.judge.timeline import named
from chaos.judge.verdict import Verdict

PROMISE = "P12"
WARNING = 4

# Name, pattern, reason. The first that matches names the record; a group `at` names the place in the signature.
PATTERNS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    (
        "lockdep",
        re.compile(
            r"WARNING: (?:possible (?:circular|recursive|irq lock inversion)|inconsistent lock state|bad unlock balance"
            r"|suspicious RCU usage|held lock freed|lock held when returning|[Nn]ested lock|\S+-safe -> \S+-unsafe)"
            r"|BUG: (?:MAX_LOCK|MAX_STACK_TRACE_ENTRIES|key \S+ (?:not in|has not been))"
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
        re.compile(r"BUG: (?:KASAN|KMSAN|KCSAN|KFENCE): .*? in (?P<at>[\w.]+)|UBSAN: (?P<kind>[\w-]+)"),
        "mm/kasan, mm/kmsan, kernel/kcsan, mm/kfence, lib/ubsan.c, where a kernel has them",
    ),
    ("lockup", re.compile(r"BUG: soft lockup|hard LOCKUP|BUG: workqueue lockup"), "kernel/watchdog.c, workqueue.c"),
    ("hung-task", re.compile(r"INFO: task \S+ blocked for more than \d+ seconds"), "kernel/hung_task.c"),
    (
        "stall",
        re.compile(r"rcu.*(?:detected stalls? on|self-detected stall|detected expedited stalls)"),
        "kernel/rcu/tree_stall.h; the last two words differ by kind",
    ),
    ("bug", re.compile(r"kernel BUG at (?P<at>\S+?):?\d*!"), "BUG() of lib/bug.c and arch/x86/kernel/traps.c"),
    ("corruption", re.compile(r"(?P<at>list_(?:add|del)) (?:double add|corruption)"), "lib/list_debug.c"),
    ("gpf", re.compile(r"general protection fault"), "die_addr() of arch/x86/kernel/dumpstack.c, before the oops"),
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
    if history.header is None or history.header.log_ahead is None:
        parts.append(unknown(PROMISE, "nothing shows that the kernel's log was read"))
    for line in lines:
        name = report(line)
        if name:
            under_way = evidence.during.at(line.t)
            when = f" (during {', '.join(map(named, under_way))})" if under_way else ""
            parts.append(
                broken(
                    PROMISE,
                    f"the kernel said: {line.text}{when}",
                    (line, *under_way),
                    signature=_signature(evidence, name, under_way),
                    expected="a quiet kernel",
                    seen=line.text,
                )
            )
    if not parts:
        parts = [kept(PROMISE, f"{len(lines)} lines in the kernel's log, none of them a report of a defect", lines)]
    return combine(PROMISE, parts)


def _signature(evidence: RunEvidence, name: str, under_way: Sequence[Invoke]) -> str:
    """A warning comes out of the very call that met its condition, and the same one may be given for many reasons: a
    counter below zero, for one. So it is of another kind in another operation, and in a move that makes one so by a
    finding. The other reports may come late."""
    across = {invoke.op: "-across" * below_zero(evidence, invoke) for invoke in under_way}
    kinds = sorted({f"{evidence.kind(invoke)}{across[invoke.op]}" for invoke in under_way})
    return f"{name}-in-{'-and-'.join(kinds)}" if kinds and name.startswith("warn:") else name


def report(line: Kernel | Console) -> str:
    """What kind of defect the line reports, like "warn:misc_cg_cancel_charge", "" if none."""
    if isinstance(line, Kernel) and line.level > WARNING:
        return ""
    for name, pattern, _ in PATTERNS:
        found = pattern.search(line.text)
        if found:
            place = next((value for value in found.groupdict().values() if value), "")
            return f"{name}:{'-'.join(place.split())}" if place else name
    return ""
