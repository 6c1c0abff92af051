# SPDX-License-Identifier: Apache-2.0
"""What the kernel counted of KVM's things before the script and after it: the same, or something is left behind.

Each count is a witness of its own. One that the host does not show is named as such and proves nothing; one that was
there before the script and not after it leaves its question open, and so does a history that does not say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from chaos.history.records import Exited, Observation
from chaos.judge.evidence import RunEvidence
from chaos.judge.parts import broken, kept, skipped, unknown
from chaos.judge.verdict import Verdict


@dataclass(frozen=True, slots=True)
class LeftWitness:
    """`field` of Observation counts `what`, of each `{}` there is if it maps names to numbers. `ours` if nobody else on
    the host can change it. `signature` names it where it has changed."""

    field: str
    what: str
    signature: str
    ours: bool = False

    def counts(self, observation: Observation) -> Mapping[str, int] | None:
        value = getattr(observation, self.field)
        return {"": value} if isinstance(value, int) else value

    def all_of_them(self) -> str:
        return self.what.replace(" {}", "s" if self.what.endswith("{}") else "")


VMS = LeftWitness("vms", "VMs in KVM's debugfs", "vms")
EVENTFDS = LeftWitness("eventfds", "eventfds on the host", "eventfds")
COUNTED = (
    LeftWitness("objects", "objects in the slab cache {}", "objects"),
    LeftWitness("references", "references to the module {}", "references"),
    LeftWitness("tables", "pages of page tables of KVM's", "table-pages"),
    LeftWitness(
        "dying_misc", "groups of the misc controller that are gone and still referred to", "dying-misc", ours=True
    ),
)


def left_behind(promise: str, evidence: RunEvidence, start: Observation, end: Observation) -> Iterator[Verdict]:
    yield _unread(promise, VMS, start, end) or _vms(promise, evidence, start, end)
    bound = any(invoke.f in ("irqfd", "ioeventfd") for invoke, _ in evidence.operations)
    # Everybody on a host makes eventfds, so the count is of use where nobody else is.
    for witness in (*COUNTED, *([EVENTFDS] if bound and _alone(evidence) else ())):
        unread = _unread(promise, witness, start, end)
        if unread:
            yield unread
        else:
            yield from _counted(promise, evidence, witness, start, end)


def _unread(promise: str, witness: LeftWitness, start: Observation, end: Observation) -> Verdict | None:
    """None if there are both counts to compare."""
    blind = [record for record in (start, end) if witness.counts(record) is None]
    if not blind:
        return None
    unsaid = [record.label for record in blind if witness.field not in record.unseen]
    if unsaid:
        return unknown(promise, f"the history has no count of {witness.all_of_them()} at the {unsaid[0]}", (start, end))
    why = blind[0].unseen[witness.field]
    if len(blind) == 1:
        text = f"{witness.all_of_them()} could not be read at the {blind[0].label} of the run: {why}"
        return unknown(promise, text, (start, end))
    return kept(promise, f"{witness.all_of_them()} are not shown by this host ({why})", (start, end))


def _vms(promise: str, evidence: RunEvidence, start: Observation, end: Observation) -> Verdict:
    """A VM's folder is named after the process that made it, so those of others do not matter."""
    both = (start, end)
    new = sorted(set(end.vms or {}) - set(start.vms or {}))
    pids = {str(record.pid) for record in evidence.history.records if isinstance(record, Exited)}
    left = new if _alone(evidence) else [folder for folder in new if folder.partition("-")[0] in pids]
    if not left:
        others = f", {len(new)} of others" if new else ""
        return kept(promise, f"no VM of the run is in KVM's debugfs any more{others}", both)
    vcpus = sum((end.vms or {})[folder] for folder in left)
    text = f"KVM's debugfs has {', '.join(left)}, {len(left)} VMs with {vcpus} vCPUs that were not there before"
    return broken(promise, text, both, signature="vms-left", expected="no VM", seen=", ".join(left))


def _counted(
    promise: str, evidence: RunEvidence, witness: LeftWitness, start: Observation, end: Observation
) -> Iterator[Verdict]:
    both = (start, end)
    before, after = witness.counts(start) or {}, witness.counts(end) or {}
    for name in sorted({*before, *after}):
        what = witness.what.format(name)
        if name not in before or name not in after:
            where = "end" if name in before else "start"
            yield unknown(promise, f"{what} were not counted at the {where} of the run", both)
        elif before[name] == after[name]:
            yield kept(promise, f"{after[name]} {what} as before", both)
        else:
            text = f"{after[name]} {what} where {before[name]} were before"
            yield _differs(promise, evidence, witness, name, text, both)


def _differs(
    promise: str,
    evidence: RunEvidence,
    witness: LeftWitness,
    name: str,
    text: str,
    both: tuple[Observation, Observation],
) -> Verdict:
    if not (witness.ours or _alone(evidence)):
        text = f"{text}, and others on this host may have changed that"
        return (
            skipped(promise, text, both, what=f"{witness.signature}-of-others")
            if evidence.shared
            else unknown(promise, text, both)
        )
    before, after = ((witness.counts(record) or {})[name] for record in both)
    signature = f"{'more' if after > before else 'fewer'}-{witness.signature}{f':{name}' if name else ''}"
    return broken(promise, text, both, signature=signature, expected=str(before), seen=str(after))


def _alone(evidence: RunEvidence) -> bool:
    header = evidence.history.header
    return header is not None and header.host == "lab" and not header.shared
