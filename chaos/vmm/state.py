# SPDX-License-Identifier: Apache-2.0
"""The state of a vCPU, as it travels from the source to the destination of a migration.

Only a plain SEV guest has state outside of its memory that a VMM can carry; that of a SEV-ES guest is in the encrypted
page which the move hands over. It is carried as a VMM has to: everything KVM knows of, in an order in which what
decides about the rest comes first. Then the destination is read again. Whatever is not what it was given is a
difference, and is named, never repaired.

There is no local APIC among it unless the VM has interrupt controllers in the kernel.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chaos.kvm.structs import DebugRegs, Fpu, Lapic, MpState, Regs, Sregs, VcpuEvents, Xcrs, from_bytes
from chaos.kvm.vcpu import Vcpu

# Time goes on between the two readings: the first must not be above the second.
CLOCKS = frozenset({0x10})  # TSC
# Hyper-V's: some of them are clocks, and no guest of ours is told that it runs on Hyper-V.
LEFT_OUT = range(0x4000_0000, 0x4000_0200)


@dataclass(frozen=True, slots=True)
class Extent:
    """What there is to carry on this host. `xsave` is the size of the extended state, 0 for the old one's."""

    msrs: Sequence[int] = ()
    xsave: int = 0
    lapic: bool = False


LITTLE = Extent()  # of a VM without a local APIC, and no MSRs: what a guest like ours can notice


def take(vcpu: Vcpu, extent: Extent = LITTLE) -> dict[str, bytes]:
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
    return state


def give(vcpu: Vcpu, state: dict[str, bytes]) -> None:
    """Raises `KernelError`; KeyError or ValueError if the state is not one that `take` made.

    An MSR that cannot be set is no error here: if it has another value than it should, `differences` names it.
    """
    vcpu.set_sregs(from_bytes(Sregs, state["sregs"]))  # first: it decides how the rest is looked at
    vcpu.set_regs(from_bytes(Regs, state["regs"]))
    vcpu.set_fpu(from_bytes(Fpu, state["fpu"]))
    vcpu.set_xcrs(from_bytes(Xcrs, state["xcrs"]))
    vcpu.set_xsave(state["xsave"])
    vcpu.set_msrs(_unpacked(state["msrs"]))
    if "lapic" in state:
        vcpu.set_lapic(from_bytes(Lapic, state["lapic"]))
    vcpu.set_events(from_bytes(VcpuEvents, state["events"]))
    vcpu.set_debug_regs(from_bytes(DebugRegs, state["debug"]))
    vcpu.set_mp_state(from_bytes(MpState, state["mp_state"]))


def differences(given: dict[str, bytes], found: dict[str, bytes]) -> Iterator[str]:
    """What is not as it was given: the parts by name, of registers which, of an area where it begins."""
    for part, was in given.items():
        now = found.get(part, b"")
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
        if found is None or (found < value if index in CLOCKS else found != value):
            yield f"msr {index:#x}"


def _other_fields(part: str, structure: type[ctypes.Structure], was: bytes, now: bytes) -> Iterator[str]:
    for name, *_ in structure._fields_:
        place = getattr(structure, name)
        here = slice(place.offset, place.offset + place.size)
        if was[here] != now[here]:
            yield f"{part} {name}"


def _packed(values: dict[int, int]) -> bytes:
    return b"".join(struct.pack("<IQ", index, value) for index, value in values.items())


def _unpacked(data: bytes) -> dict[int, int]:
    """Raises ValueError if it is not what `_packed` made."""
    if len(data) % 12:
        raise ValueError(f"{len(data)} bytes are no list of MSRs")
    return dict(struct.iter_unpack("<IQ", data))
