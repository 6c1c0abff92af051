# SPDX-License-Identifier: Apache-2.0
"""The state of a vCPU, as it travels from the source to the destination of a migration.

Only a plain SEV guest has state outside of its memory that a VMM can carry; that of a SEV-ES guest is in the encrypted
page which the move hands over.
"""

from __future__ import annotations

from chaos.kvm.structs import Fpu, MpState, Regs, Sregs, VcpuEvents, from_bytes
from chaos.kvm.vcpu import Vcpu


def take(vcpu: Vcpu) -> dict[str, bytes]:
    """Raises `KernelError`."""
    return {
        "regs": bytes(vcpu.regs()),
        "sregs": bytes(vcpu.sregs()),
        "fpu": bytes(vcpu.fpu()),
        "mp_state": bytes(vcpu.mp_state()),
        "events": bytes(vcpu.events()),
    }


def give(vcpu: Vcpu, state: dict[str, bytes]) -> None:
    """Raises `KernelError`; KeyError or ValueError if the state is not one that `take` made."""
    vcpu.set_sregs(from_bytes(Sregs, state["sregs"]))  # first: it decides how the rest is looked at
    vcpu.set_regs(from_bytes(Regs, state["regs"]))
    vcpu.set_fpu(from_bytes(Fpu, state["fpu"]))
    vcpu.set_events(from_bytes(VcpuEvents, state["events"]))
    vcpu.set_mp_state(from_bytes(MpState, state["mp_state"]))
