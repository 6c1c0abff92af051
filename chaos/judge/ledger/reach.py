# SPDX-License-Identifier: Apache-2.0
"""How far an operation has come that is stopped at a place in the kernel.

From parts 1.2 to 1.6 of the kernel contract (docs/contract.md), read again in the sources of 6.1 and 6.12. What is not
in the tables may be reached at more than one moment of the operation (any firmware command is sent by the same
function), or at moments that differ between kernels (`sev_free_vcpu`), and says nothing.

The order of a move: descriptor, both VMs locked, checks of both, the caller's cgroup charged, destination's vCPUs
locked, source's vCPUs locked, commit, source dead, both unlocked, the other cgroup uncharged. So the calls by which
`nth` may tell a function apart (the vCPUs of either side, one vCPU and the next) come equally far. What gives back on
the way out does so for a move that has succeeded and for one that has failed: either is possible there, and both
cgroups are charged in either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from chaos.history.records import Held
from chaos.judge.ledger.world import Reach, World, give_back

ANY = frozenset(Reach)
BEFORE = frozenset({Reach.BEFORE})
AHEAD = frozenset({Reach.AHEAD})
OWING = frozenset({Reach.OWING})
AFTER = frozenset({Reach.AFTER})

# Places that hold until they are released, or the process is killed. The others let go by themselves: a vCPU leaves the
# guest, another call comes back, the driver has no more patience with its firmware.
FIRM = frozenset({"kernel", "page"})

# Operation → kernel function whose entry it is stopped at.
FUNCTIONS: Mapping[str, Mapping[str, frozenset[Reach]]] = {
    "init": {
        "__sev_guest_init": BEFORE,
        "sev_guest_init": BEFORE,
        "sev_asid_new": BEFORE,
        "misc_cg_try_charge": BEFORE,
        "sev_flush_asids": AHEAD,
        "sev_guest_df_flush": AHEAD,
        "sev_platform_init": AHEAD,
        "sev_asid_free": AHEAD,  # it is failing
        "misc_cg_uncharge": AHEAD,  # and so it is here
        "kvm_arch_vcpu_precreate": AFTER,
        "kvm_arch_vcpu_create": AFTER,
    },
    "launch_start": {
        "sev_launch_start": BEFORE,
        "sev_issue_cmd_external_user": BEFORE,
        "sev_guest_activate": AHEAD,
        "sev_guest_decommission": AHEAD,  # it is failing
    },
    "move": {
        "kvm_vm_ioctl_enable_cap": BEFORE,
        "sev_vm_move_enc_context_from": BEFORE,
        "sev_lock_two_vms": BEFORE,
        "misc_cg_try_charge": BEFORE,
        "sev_lock_vcpus_for_migration": AHEAD,
        "kvm_lock_all_vcpus": AHEAD,
        "sev_check_source_vcpus": AHEAD,
        "sev_migrate_from": AHEAD,
        "sev_init_vmcb": OWING,
        "sev_unlock_vcpus_for_migration": AHEAD | OWING,
        "misc_cg_uncharge": AHEAD | OWING,
    },
    "mirror": {
        "kvm_vm_ioctl_enable_cap": BEFORE,
        "sev_vm_copy_enc_context_from": BEFORE,
        "sev_lock_two_vms": BEFORE,
        "kvm_arch_vcpu_precreate": AFTER,
        "kvm_arch_vcpu_create": AFTER,
    },
    "close": {
        "kvm_vm_release": BEFORE,
        "kvm_destroy_vm": BEFORE,
        "kvm_arch_destroy_vm": BEFORE,
        "svm_vm_destroy": BEFORE,
        "sev_vm_destroy": BEFORE,
        "sev_guest_deactivate": BEFORE,
        "sev_guest_decommission": BEFORE,
        "sev_asid_free": OWING,
        "misc_cg_uncharge": OWING,
    },
    "create_vcpu": {"kvm_arch_vcpu_precreate": BEFORE, "kvm_arch_vcpu_create": AHEAD},
}

# Operation → firmware command without an answer. It may have been carried out, and only its answer be withheld.
COMMANDS: Mapping[str, Mapping[str, frozenset[Reach]]] = {
    "init": {"INIT": AHEAD, "INIT_EX": AHEAD, "DF_FLUSH": AHEAD},
    "launch_start": {"LAUNCH_START": BEFORE | AHEAD, "ACTIVATE": AHEAD, "DECOMMISSION": AHEAD},
    "close": {"DEACTIVATE": BEFORE, "DECOMMISSION": BEFORE | OWING},
}


def reaches(f: str, held: Held) -> frozenset[Reach]:
    """How far operation `f` may have come where it is held."""
    match held.place:
        case "vcpu":  # for whose mutex only a move waits
            return AHEAD
        case "lock" | "page":  # both come before anything is done
            return BEFORE
        case "kernel":
            return FUNCTIONS.get(f, {}).get(held.function, ANY)
        case "firmware":
            return COMMANDS.get(f, {}).get(held.command, ANY)
    return ANY


def at(worlds: Iterable[World], op: int, possible: frozenset[Reach]) -> frozenset[World]:
    """Those of the worlds in which the operation can be stopped, having come so far.

    Where there is nothing to take ahead (a move within a cgroup), a world before the operation is also one in which it
    is AHEAD; where there is nothing to give back, one after it is also one in which it is OWING. Such a world is told
    from the others by what it does not come from.
    """
    every = frozenset(worlds)
    by = {reach: {world for world in every if world.reach(op) is reach} for reach in Reach}
    found = {world for reach in possible for world in by[reach]}
    for between, plain in ((Reach.AHEAD, Reach.BEFORE), (Reach.OWING, Reach.AFTER)):
        if between in possible:
            found |= by[plain] - {give_back(world, op) for world in by[between]}
    return frozenset(found)
