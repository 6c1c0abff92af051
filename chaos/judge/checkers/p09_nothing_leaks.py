# SPDX-License-Identifier: Apache-2.0
"""P9, nothing leaks: after the last close everything is as it was before the first open.

The runner observes at `start`, before anything is created, and at `end`, after everything is closed, and fills the
host to capacity at both. A charge that stays shows in the counters, a context in the firmware's guest count, a
cgroup's reference in the cgroups that are still dying when all have been removed, and an ASID that is lost while every
counter reads zero only in the filling: in as many contexts as the host has ASIDs, not only in as many as before.
Pages of a guest that stay pinned show in the kernel's count of all pins of the host, VMs, vCPUs and page tables in
counts of theirs (`left_behind`). In a lab nobody else changes these; on another host somebody may, and a count that has
changed says nothing.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from chaos.experiment.model import Experiment
from chaos.history.reading import KEYS, charged, errname
from chaos.history.records import Filled, History, Observation
from chaos.judge.evidence import RunEvidence
from chaos.judge.finding_counters import all_explained, by_mirrors
from chaos.judge.ledger.firmware_contexts import GONE, told
from chaos.judge.left_behind import left_behind
from chaos.judge.parts import broken, combine, kept, skipped, unknown
from chaos.judge.verdict import Verdict

PROMISE = "P9"
START, END = "start", "end"
_SHOWN = 3
_ALLOCATOR = re.compile(
    r"_*_*(?:k(?:m|v|vm|vz|z)?alloc|kmem_cache_alloc|slab_|krealloc|kmemdup|kstrdup|v[mz]?alloc"
    r"|alloc_pages|get_free_pages|kasan_|kmemleak_|pcpu_alloc|v?memdup|kv?asprintf)"
)


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    observed = {r.label: r for r in history.records if isinstance(r, Observation)}
    filled = {r.label: r for r in history.records if isinstance(r, Filled)}
    parts: list[Verdict] = []
    if START in observed and END in observed:
        start, end = observed[START], observed[END]
        alive = _alive(evidence, end)
        if alive:
            return unknown(PROMISE, f"{', '.join(alive)} still lived when the end was observed", (end,))
        parts += [*_charges(evidence, end), _guests(evidence, start, end), _dying(start, end)]
        parts.append(_pinned(evidence, start, end))
        parts += left_behind(PROMISE, evidence, start, end)
        parts += _lost(end)
    else:
        missing = " and ".join(label for label in (START, END) if label not in observed)
        parts.append(unknown(PROMISE, f"the host was not observed at the {missing} of the run"))
    if START in filled and END in filled:
        first, last = filled[START], filled[END]
        parts += _filled(evidence, first, last)
        parts.append(_referred(evidence, first, last))
        if START in observed:
            parts += _full(evidence, observed[START], first, last)
    else:
        missing = " and ".join(label for label in (START, END) if label not in filled)
        parts.append(unknown(PROMISE, f"the host was not filled to capacity at the {missing} of the run"))
    return combine(PROMISE, parts)


def _alive(evidence: RunEvidence, end: Observation) -> list[str]:
    """VMM processes that were started and not reaped before the observation."""
    spawned = {
        invoke.agent: invoke.seq
        for invoke, done in evidence.operations
        if invoke.f == "spawn" and (done is None or done.outcome != "fail")
    }
    ends = {agent: evidence.exited(agent, after=seq) for agent, seq in spawned.items()}
    return [agent for agent, exited in ends.items() if exited is None or exited.seq > end.seq]


def _charges(evidence: RunEvidence, end: Observation) -> Iterator[Verdict]:
    """Every counter reads zero again; the run's own cgroup sums them up, dying ones included."""
    if "current" not in end.misc.get(".", {}):
        yield unknown(PROMISE, "the counters of the run's cgroup were not read at its end", (end,))
        return
    left = [
        (cgroup, key, charged(value))
        for cgroup, files in sorted(end.misc.items())
        for key, value in sorted(files.get("current", {}).items())
        if value and key in KEYS
    ]
    if not left:
        yield kept(PROMISE, "every counter reads zero again", (end,))
        return
    seen = ", ".join(f"{cgroup} {key} {value}" for cgroup, key, value in left)
    keys = "+".join(sorted({key for _, key, _ in left}))
    by = all_explained(evidence, end.seq, {(cgroup, key): value for cgroup, key, value in left})
    signature = f"charge-left{f'-after-{by}' if by else ''}:{keys}"
    yield broken(PROMISE, f"charges were left: {seen}", (end,), signature=signature, expected="0 everywhere", seen=seen)


def _guests(evidence: RunEvidence, start: Observation, end: Observation) -> Verdict:
    contexts = evidence.contexts
    if evidence.shared:
        return skipped(PROMISE, "the firmware counts guests of others too", (start, end), what="guests-of-others")
    if start.guests is None or end.guests is None:
        why, signature = "", ""
        if start.guests is not None and contexts.gone_by(end.until):
            why, signature = f": {contexts.gone}", GONE
        text = f"the firmware could not be asked for its guest count{why}"
        return unknown(PROMISE, text, (start, end), signature=signature)
    blind = contexts.blind(start) or contexts.blind(end)
    if blind:
        signature = GONE if contexts.gone_by(end.until) and not contexts.blind(start) else ""
        return unknown(PROMISE, f"the firmware's guest count says nothing: {blind}", (start, end), signature=signature)
    owed = contexts.owed_at(end.t)
    due = start.guests + len(owed)
    more = f", {len(owed)} of them owed to a fault: {told(owed)}" if owed else ""
    if end.guests == due:
        return kept(PROMISE, f"the firmware counts {end.guests} guests{more or ' as before'}", (start, end))
    return broken(
        PROMISE,
        f"the firmware counts {end.guests} guests where it counted {start.guests} before{more}",
        (start, end),
        signature="firmware-counts-more" if end.guests > due else "firmware-counts-fewer",
        expected=str(due),
        seen=str(end.guests),
    )


def _dying(start: Observation, end: Observation) -> Verdict:
    if start.dying == end.dying:
        return kept(PROMISE, "no removed cgroup is still referred to", (start, end))
    return broken(
        PROMISE,
        f"{end.dying} removed cgroups are still referred to, {start.dying} before",
        (start, end),
        signature="dying-cgroups",
        expected=str(start.dying),
        seen=str(end.dying),
    )


def _pinned(evidence: RunEvidence, start: Observation, end: Observation) -> Verdict:
    header, both = evidence.history.header, (start, end)
    if start.pinned is None or end.pinned is None:
        return unknown(PROMISE, "the pinned pages of the host were not counted", both)
    if start.pinned == end.pinned:
        return kept(PROMISE, f"{end.pinned} pages are pinned as before", both)
    text = f"{end.pinned} pages are pinned where {start.pinned} were before"
    if evidence.shared or header is None or header.host != "lab":
        text = f"{text}, and others on this host may pin some too"
        if evidence.shared:
            return skipped(PROMISE, text, both, what="pages-of-others")
        return unknown(PROMISE, text, both)
    way, expected, seen = "more" if end.pinned > start.pinned else "fewer", str(start.pinned), str(end.pinned)
    return broken(PROMISE, text, both, signature=f"{way}-pages-pinned", expected=expected, seen=seen)


def _lost(end: Observation) -> Iterator[Verdict]:
    """What kmemleak says, where a kernel has it."""
    if "leaked" in end.unseen:
        yield unknown(PROMISE, f"kmemleak could not be asked: {end.unseen['leaked']}", (end,))
    elif end.leaked:
        more = f", and {len(end.leaked) - _SHOWN} more" if len(end.leaked) > _SHOWN else ""
        text = f"kmemleak finds {len(end.leaked)} objects that nobody refers to: {'; '.join(end.leaked[:_SHOWN])}{more}"
        by = "+".join(sorted({_allocated_by(each) for each in end.leaked}))
        yield broken(PROMISE, text, (end,), signature=f"lost:{by}", expected="none", seen=str(len(end.leaked)))
    elif end.leaked is not None:
        yield kept(PROMISE, "kmemleak finds no object that nobody refers to", (end,))


def _allocated_by(functions: str) -> str:
    """The innermost of "a < b < c" that is no allocator."""
    names = functions.split(" < ")
    return next((name for name in names if not _ALLOCATOR.match(name)), names[-1]).partition(".")[0]


def _filled(evidence: RunEvidence, start: Filled, end: Filled) -> Iterator[Verdict]:
    """A freed ASID can be had again once the firmware has done a DF_FLUSH."""
    for key in sorted({*start.count, *end.count}):
        if key not in start.count or key not in end.count:
            where = "end" if key in start.count else "start"
            yield unknown(PROMISE, f"{key} was not filled to capacity at the {where} of the run", (start, end))
            continue
        before, after = start.count[key], end.count[key]
        if before > after and evidence.contexts.gone_by(end.t):
            text = f"{after} {key} ASIDs could be allocated after the run, {before} before it"
            yield unknown(PROMISE, f"{text}, and {evidence.contexts.gone}", (start, end), signature=GONE)
        elif before != after and evidence.shared:
            text = f"{after} {key} ASIDs could be allocated after the run, {before} before it, on a shared host"
            yield unknown(PROMISE, text, (start, end))
        elif before > after and end.errno.get(key, errno.EBUSY) != errno.EBUSY:
            text = f"{after} {key} ASIDs could be allocated after the run, {before} before it: then it was refused with"
            yield unknown(PROMISE, f"{text} {errname(end.errno[key])}, which no missing ASID is", (start, end))
        elif before != after:
            yield broken(
                PROMISE,
                f"{after} {key} ASIDs could be allocated after the run, {before} before it",
                (start, end),
                signature=f"{_way(evidence, key, before - after, end)}:{key}",
                expected=str(before),
                seen=str(after),
            )
        elif start.errno.get(key, 0) != end.errno.get(key, 0):
            names = errname(start.errno.get(key, 0)), errname(end.errno.get(key, 0))
            text = f"filling {key} stopped at {before} twice, but for different reasons: {names[0]}, then {names[1]}"
            yield unknown(PROMISE, text, (start, end))
        else:
            yield kept(PROMISE, f"{after} {key} ASIDs can be allocated again", (start, end))
    if not start.count and not end.count:
        yield unknown(PROMISE, "no key was filled to capacity", (start, end))


def _full(evidence: RunEvidence, observed: Observation, start: Filled, end: Filled) -> Iterator[Verdict]:
    """As many contexts as the host has ASIDs, but for those in use and those that the run's own limit leaves to others;
    and it is for want of one more that filling stopped."""
    header, both = evidence.history.header, (start, end)
    if header is None or evidence.shared:
        yield skipped(
            PROMISE, "how many ASIDs can be allocated depends on others of this host", both, what="asids-of-others"
        )
        return
    mine = observed.misc.get(".", {})
    if "current" not in mine:
        yield unknown(PROMISE, "what was in use at the start of the run was not read", (observed,))
        return
    for key in sorted(start.count.keys() - header.asids.keys()):
        yield unknown(PROMISE, f"the history does not say how many ASIDs of {key} the host has", both)
    for key, capacity in sorted(header.asids.items()):
        left = capacity - mine["current"].get(key, 0)
        due = min(left, mine.get("max", {}).get(key, left))
        could = f"capacity {capacity}, {start.count.get(key, 0)} {key} ASIDs can be allocated"
        if capacity and key not in start.count:
            yield unknown(PROMISE, f"{key} was not filled to capacity", both)
        elif start.count.get(key, 0) == due and due < left:
            yield skipped(
                PROMISE,
                f"{could}: the run may take no more, and none that is lost beyond would show",
                both,
                what="asids-beyond-the-limit",
            )
        elif start.count.get(key, 0) == due:
            yield _stopped(key, due, start, end)
        elif start.count[key] < due and start.errno.get(key, 0) != errno.EBUSY:
            why = errname(start.errno.get(key, 0))
            yield unknown(PROMISE, f"{could}, and the next was refused with {why}, which no missing ASID is", both)
        else:
            signature = f"{'fewer' if start.count[key] < due else 'more'}-contexts-than-asids:{key}"
            yield broken(PROMISE, could, both, signature=signature, expected=str(due), seen=str(start.count[key]))


def _stopped(key: str, due: int, start: Filled, end: Filled) -> Verdict:
    """By what, of a host that had `due` contexts of the key; why it was otherwise in the end is asked elsewhere."""
    why = start.errno.get(key, 0)
    if due and why != errno.EBUSY:
        text = f"allocating {key} ASIDs stopped at {due} with {errname(why)}, expected EBUSY"
        return unknown(PROMISE, text, (start, end))
    return kept(PROMISE, f"all {due} {key} ASIDs could be allocated", (start, end))


def _referred(evidence: RunEvidence, start: Filled, end: Filled) -> Verdict:
    """Whether all cgroups went, that of a mirror apart which a finding says is charged, and held, for good.

    Where the kernel tells controllers apart it is misc's groups that count: others', as memory's, stay for a while.
    """
    both, what = (start, end), "removed cgroups are"
    before, after = start.dying, end.dying
    if start.dying_misc is not None and end.dying_misc is not None:
        before, after, what = start.dying_misc, end.dying_misc, "groups of the misc controller are gone and"
    if before is None or after is None:
        return unknown(PROMISE, "the history does not say whether the run's cgroups went when they were removed", both)
    if before == after:
        return kept(PROMISE, "every cgroup of the run went when it was removed", both)
    mirrors = {level for level, _ in by_mirrors(evidence, end.seq) if level != "."}
    by = "-after-mirror-move" if after - before == len(mirrors) else ""
    return broken(
        PROMISE,
        f"{after} {what} still referred to when all were removed, {before} before",
        both,
        signature=f"{'more' if after > before else 'fewer'}-cgroups-referred-to{by}",
        expected=str(before),
        seen=str(after),
    )


def _way(evidence: RunEvidence, key: str, missing: int, end: Filled) -> str:
    """Which contexts cannot be had any more may be just those that a finding about mirrors is about."""
    if missing > 0 and missing == by_mirrors(evidence, end.seq)[".", key]:
        return "fewer-contexts-after-mirror-move"
    return "fewer-contexts" if missing > 0 else "more-contexts"
