# SPDX-License-Identifier: Apache-2.0
"""With which ASIDs a CPU enters guests, counted by the kernel's own tracer.

A VM that is not encrypted has no ASID of its own: KVM gives each of its vCPUs one of the CPU's, of the CPU's present
generation (svm.c, new_asid), and the same one of the same generation to no other. A guest under SEV keeps its own, and
has no generation.

The counts are histograms of the tracer's, so that nothing is written for the thousands of entries that a run has. The
probe is on the last function of kvm.ko before a VM is entered; where the ASID stands then is taken from the module's
BTF.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from chaos.linux import tracefs
from chaos.linux.btf import ROOT as BTF
from chaos.linux.btf import ModuleTypes, NoType
from chaos.linux.tracefs import NoTracing

_FUNCTION = "kvm_wait_lapic_expire"
_EVENT = "vm_entry"
_FOLDER = f"events/{tracefs.COUNTED}/{_EVENT}"
_SIZE = 1 << 16
# A histogram has three keys at most, so which thread a vCPU has is another one.
_ASIDS = "vcpu,asid,generation"
_THREADS = "vcpu,common_pid"
_ASID = re.compile(r"\{ vcpu: *(\w+), asid: *(\d+), generation: *(\d+) *\} hitcount: *(\d+)")
_THREAD = re.compile(r"\{ vcpu: *(\w+), common_pid: *(\d+) *\} hitcount")
_DROPPED = re.compile(r"Dropped: (\d+)")


@dataclass(frozen=True, slots=True)
class VmEntries:
    """So many entries of one vCPU with one ASID. `vcpu` counts the vCPUs, in no order that means anything; `tids` are
    the threads that have driven it. `generations` are empty of a guest under SEV; the `shared` of them are those in
    which another vCPU was entered with this ASID."""

    vcpu: int
    tids: tuple[int, ...]
    asid: int
    generations: frozenset[int]
    shared: frozenset[int]
    count: int


class EntryCounter:
    """Counts the entries on one CPU, from when it is made. Raises `NoTracing` where it cannot be done."""

    def __init__(self, cpu: int, root: Path = tracefs.ROOT, btf: Path = BTF) -> None:
        self._instance = tracefs.make_counting(root, _EVENT, f"{_FUNCTION} {_fields(btf)}")
        try:
            for keys in (_THREADS, _ASIDS):  # so that no vCPU is in the second one alone
                self._instance.write(f"{_FOLDER}/trigger", f"hist:keys={keys}:size={_SIZE} if common_cpu == {cpu}")
        except OSError as error:
            self._instance.remove()
            raise NoTracing(f"{error.filename}: {error.strerror}") from error

    def read(self) -> tuple[VmEntries, ...]:
        """Raises `NoTracing` if there were more than it had room for, OSError."""
        return parse((self._instance.path / _FOLDER / "hist").read_text())

    def close(self) -> None:
        """Raises OSError."""
        self._instance.remove()


def parse(text: str) -> tuple[VmEntries, ...]:
    """Both histograms as tracefs tells them, one after the other. Raises `NoTracing`."""
    dropped = [int(number) for number in _DROPPED.findall(text)]
    if dropped != [0, 0]:
        raise NoTracing("the tracer had no room for every entry into a guest")
    tids: dict[str, list[int]] = {}
    for vcpu, tid in _THREAD.findall(text):
        tids.setdefault(vcpu, []).append(int(tid))
    counts: Counter[tuple[str, int]] = Counter()
    given: dict[tuple[str, int], set[int]] = {}
    owners: dict[tuple[int, int], set[str]] = {}
    for vcpu, asid, generation, count in _ASID.findall(text):
        counts[vcpu, int(asid)] += int(count)
        given.setdefault((vcpu, int(asid)), set()).update({int(generation)} - {0})
        owners.setdefault((int(asid), int(generation)), set()).add(vcpu)
    numbers = {vcpu: number for number, vcpu in enumerate(tids)}
    return tuple(
        VmEntries(
            numbers[vcpu], tuple(sorted(tids[vcpu])), asid, frozenset(generations),
            frozenset(each for each in generations if len(owners[asid, each]) > 1), counts[vcpu, asid],
        )
        for (vcpu, asid), generations in given.items()
    )  # fmt: skip


def _fields(btf: Path) -> str:
    try:
        types = ModuleTypes("kvm_amd", btf)
        asid, vmcb = types.offset("vcpu_svm", "asid"), types.offset("vcpu_svm", "current_vmcb")
        generation = types.offset("kvm_vmcb_info", "asid_generation")
    except NoType as error:
        raise NoTracing(str(error)) from error
    return f"vcpu=%di:x64 asid=+{asid}(%di):u32 generation=+{generation}(+{vmcb}(%di)):u64"
