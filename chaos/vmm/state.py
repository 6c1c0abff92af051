# SPDX-License-Identifier: Apache-2.0
"""The state of a vCPU, as it travels from the source to the destination of a migration.

Only a plain SEV guest has state outside of its memory that a VMM can carry; that of a SEV-ES guest is in the encrypted
page which the move hands over. It is carried as a VMM has to: everything KVM knows of, in an order in which what
decides about the rest comes first. Then the destination is read again. Whatever is not what it was given is a
difference, and is named, never repaired. What moves by itself differs if it has moved in a way that it cannot.

The time-stamp counter is carried by its offset from the host's, which both sides share, so that it goes on as if
nothing had happened. Written as an MSR it would not arrive: KVM takes a value that is less than a second off for an
attempt to bring vCPUs into step, and gives the vCPU the counter of the one that was written before it, on 6.1 also
that of the VM's creation (kvm_synchronize_tsc). The guest would see its clock go back.

There is no local APIC among it unless the VM has interrupt controllers in the kernel.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chaos.kvm.structs import DebugRegs, Fpu, Lapic, MpState, Regs, Sregs, VcpuEvents, Xcrs, Xsave, from_bytes
from chaos.kvm.vcpu import KvmVcpu

TSC = 0x10
TSC_DEADLINE = 0x6E0
# KVM writes how much is left of the APIC's timer into the page at each reading.
TIMER_COUNT = slice(0x390, 0x394)
# Hyper-V's: some of them are clocks, and no guest of ours is told that it runs on Hyper-V.
LEFT_OUT = range(0x4000_0000, 0x4000_0200)

_STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "sregs": Sregs,
    "regs": Regs,
    "fpu": Fpu,
    "xcrs": Xcrs,
    "lapic": Lapic,
    "events": VcpuEvents,
    "debug": DebugRegs,
    "mp_state": MpState,
}
_MSR = struct.Struct("<IQ")


@dataclass(frozen=True, slots=True)
class Extent:
    """What there is to carry on this host. `xsave` is the size of the extended state, 0 for the old one's;
    `tsc_offset` whether KVM says how far the counter is ahead of the host's."""

    msrs: Sequence[int] = ()
    xsave: int = 0
    lapic: bool = False
    tsc_offset: bool = False


LITTLE = Extent()  # of a VM without a local APIC, and no MSRs: what a guest like ours can notice


def take(vcpu: KvmVcpu, extent: Extent = LITTLE) -> dict[str, bytes]:
    """Raises `KernelError`."""
    state = {
        "sregs": bytes(vcpu.sregs()),
        "regs": bytes(vcpu.regs()),
        "fpu": bytes(vcpu.fpu()),
        "xcrs": bytes(vcpu.xcrs()),
        "xsave": vcpu.xsave(extent.xsave),
        "msrs": _packed(vcpu.msrs([index for index in extent.msrs if index not in LEFT_OUT])),
        "events": bytes(vcpu.events()),
        "debug": bytes(vcpu.debug_regs()),
        "mp_state": bytes(vcpu.mp_state()),
    }
    if extent.lapic:
        state["lapic"] = bytes(vcpu.lapic())
    if extent.tsc_offset:
        state["tsc_offset"] = struct.pack("<Q", vcpu.tsc_offset())
    return state


def give(vcpu: KvmVcpu, state: dict[str, bytes]) -> None:
    """Raises `KernelError`; KeyError or ValueError if the state is not one that `take` made.

    An MSR that cannot be set is no error here: if it has another value than it should, `differences` names it.
    """
    vcpu.set_sregs(from_bytes(Sregs, state["sregs"]))  # first: it decides how the rest is looked at
    vcpu.set_regs(from_bytes(Regs, state["regs"]))
    vcpu.set_fpu(from_bytes(Fpu, state["fpu"]))
    vcpu.set_xcrs(from_bytes(Xcrs, state["xcrs"]))
    vcpu.set_xsave(state["xsave"])
    msrs = _unpacked(state["msrs"])
    if "tsc_offset" in state:
        msrs.pop(TSC, None)
        vcpu.set_tsc_offset(*struct.unpack("<Q", state["tsc_offset"]))
    if "lapic" in state:  # before the MSRs: TSC_DEADLINE is taken only by an APIC whose timer goes by it
        vcpu.set_lapic(from_bytes(Lapic, state["lapic"]))
    vcpu.set_msrs(msrs)
    vcpu.set_events(from_bytes(VcpuEvents, state["events"]))
    vcpu.set_debug_regs(from_bytes(DebugRegs, state["debug"]))
    vcpu.set_mp_state(from_bytes(MpState, state["mp_state"]))


def problem_with(state: dict[str, bytes], extent: Extent) -> str:
    """Why this cannot be what `take` gives on this host, "" if it can."""
    sizes = {part: ctypes.sizeof(structure) for part, structure in _STRUCTURES.items()}
    sizes |= {"xsave": max(extent.xsave, ctypes.sizeof(Xsave)), "tsc_offset": 8}
    if not extent.lapic:
        del sizes["lapic"]
    if not extent.tsc_offset:
        del sizes["tsc_offset"]
    parts = {*sizes, "msrs"}
    if state.keys() != parts:
        return f"it has the parts {', '.join(sorted(state)) or '(none)'}, not {', '.join(sorted(parts))}"
    for part, size in sizes.items():
        if len(state[part]) != size:
            return f"{part} has {size} bytes, not {len(state[part])}"
    return f"{len(state['msrs'])} bytes are no list of MSRs" if len(state["msrs"]) % _MSR.size else ""


def differences(given: dict[str, bytes], found: dict[str, bytes]) -> Iterator[str]:
    """What is not as it was given: the parts by name, of registers which, of an area where it begins."""
    for part, data in given.items():
        was, now = _still(part, data), _still(part, found.get(part, b""))
        if part == "msrs":
            yield from _other_msrs(_unpacked(was), _unpacked(now))
        elif part in ("regs", "sregs"):
            yield from _other_fields(part, Regs if part == "regs" else Sregs, was, now)
        elif was != now:
            pairs = enumerate(zip(was, now, strict=False))
            yield f"{part} at {next((at for at, (a, b) in pairs if a != b), min(len(was), len(now)))}"


def _other_msrs(was: dict[int, int], now: dict[int, int]) -> Iterator[str]:
    for index, value in was.items():
        found = now.get(index)
        if found is None or not _may_become(index, value, found):
            yield f"msr {index:#x}"


def _may_become(index: int, was: int, now: int) -> bool:
    """Whether an MSR that was `was` may be `now` a moment later, with its vCPU out of the guest."""
    if index == TSC:
        return now >= was
    return now == was or (index == TSC_DEADLINE and now == 0)  # when it has passed


def _still(part: str, data: bytes) -> bytes:
    """The part without what moves by itself and may have any value."""
    if part != "lapic" or len(data) < TIMER_COUNT.stop:
        return data
    return data[: TIMER_COUNT.start] + bytes(4) + data[TIMER_COUNT.stop :]


def _other_fields(part: str, structure: type[ctypes.Structure], was: bytes, now: bytes) -> Iterator[str]:
    for name, *_ in structure._fields_:
        place = getattr(structure, name)
        here = slice(place.offset, place.offset + place.size)
        if was[here] != now[here]:
            yield f"{part} {name}"


def _packed(values: dict[int, int]) -> bytes:
    return b"".join(_MSR.pack(index, value) for index, value in values.items())


def _unpacked(data: bytes) -> dict[int, int]:
    """Raises ValueError if it is not what `_packed` made."""
    if len(data) % _MSR.size:
        raise ValueError(f"{len(data)} bytes are no list of MSRs")
    return dict(_MSR.iter_unpack(data))
