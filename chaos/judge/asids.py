# SPDX-License-Identifier: Apache-2.0
"""P5 for what a CPU takes guests for by their ASIDs: no two vCPUs are entered with the same one.

An ASID that a CPU has given in one of its generations belongs to one vCPU until that generation is over, when what was
translated under it is flushed (svm.c, new_asid). One that a second vCPU is entered with in the same generation hands
each of the two the other's translations: on hardware they read and write each other's memory, and where a CPU keeps no
translations by ASID, as the lab's does not, nothing but this count shows it. An ASID of a guest's own, under SEV, is
what P4 asks about.
"""

from __future__ import annotations

from collections.abc import Iterator

from chaos.history.records import Entered
from chaos.judge.evidence import RunEvidence
from chaos.judge.parts import broken, kept, unknown
from chaos.judge.verdict import Verdict


def asids(promise: str, evidence: RunEvidence) -> Iterator[Verdict]:
    """One part for all that was counted, or for each vCPU that shared; none where nobody counted."""
    lost = (note for note in evidence.lost_of("entries") if note.witness)  # the others are older than this witness
    for note in lost:
        yield unknown(promise, f"a witness was lost: {note.text}", (note,))
    given = [each for each in evidence.history.records if isinstance(each, Entered) and each.generations]
    for each in given:
        if each.shared:
            text = f"CPU {each.cpu} entered the vCPU of thread {', '.join(map(str, each.tids))} with ASID {each.asid}"
            text += f", and another one too in its generation {', '.join(map(str, each.shared))}"
            yield broken(promise, text, (each,), signature="asid-of-two-vcpus", expected="one vCPU", seen="two")
    if given and not any(each.shared for each in given):
        cpus = ", ".join(str(cpu) for cpu in sorted({each.cpu for each in given}))
        vcpus = len({(each.cpu, each.since, each.vcpu) for each in given})
        yield kept(promise, f"{vcpus} vCPUs were entered on CPU {cpus}, each with ASIDs of its own", given)
