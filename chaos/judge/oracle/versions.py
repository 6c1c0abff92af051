# SPDX-License-Identifier: Apache-2.0
"""In what kernels differ, as far as the contract says that they do: one table, and nothing of it anywhere else.

Late stable kernels carry back-ports, so a difference has a first version in mainline and one in each stable series that
took it. A series that is not named, and is older than the mainline version, does not have it. Where the contract names
a month and no version, the version is that of the month's first release of the series, and "[K]" marks it as from
memory; 6.1.192 and 6.12.117 have been read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from chaos.errors import UsageError

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Difference:
    """`name` is a field of `Rules`. True from `mainline` on, and in the series of `stable` from the version given."""

    name: str
    mainline: Version
    stable: tuple[Version, ...]
    source: str


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "mirrored_source_moves",
        (5, 18, 0),
        (),
        "contract 1.7: 17d44a96f000 (5.16) refused with EBUSY, b2125513dfc0 (5.18) moves the mirrors along",
    ),
    Difference(
        "second_init_invalid",
        (6, 10, 0),
        (),
        "contract 3.4, INIT twice: sev_guest_init() answers EBUSY on 6.1, __sev_guest_init() EINVAL on 6.12",
    ),
    Difference(
        "init_errors_shown",
        (6, 10, 0),
        (),
        "contract 1.7 and 3.4: before 6.10 every error of sev_asid_new() is shown as EBUSY",
    ),
    Difference("vm_types", (6, 10, 0), (), "contract 1.2 step 6 and 3.4: types 2 and 3, INIT2, and both ends alike"),
    Difference(
        "vcpu_creation_busy",
        (6, 16, 0),
        ((6, 1, 146), (6, 6, 99), (6, 12, 39), (6, 15, 7)),
        "contract 1.2 step 10, ecf371f8b02d (CVE-2025-38455), stables of July 2025 [K]; read in 6.1.192 and 6.12.117",
    ),
    Difference(
        "vcpu_creation_locked",
        (7, 3, 0),
        (),
        "contract 1.2 step 10: KVM_CREATE_VCPU holds kvm->lock all the time (kvm_vm_ioctl_create_vcpu), so a move "
        "waits for it and meets no half a vCPU, and sev_check_source_vcpus() no longer looks for one; read in 7.3.4, "
        "not so on 7.2.13",
    ),
    Difference(
        "vmsa_creation_busy",
        (7, 1, 0),
        ((6, 12, 117),),
        "contract 3.4: LAUNCH_UPDATE_VMSA while a vCPU is created; 6.12.117 is the first read, 6.1.192 has not",
    ),
    Difference(
        "vmsa_once",
        (7, 1, 0),
        ((6, 12, 117),),
        "contract 3.4: LAUNCH_UPDATE_VMSA again; 6.12.117 is the first read, 6.1.192 leaves it to the firmware",
    ),
    Difference(
        "irqfd_unique",
        (6, 17, 0),
        (),
        "contract 1.9: a patch of 22 May 2025, so that no interrupt is lost unsaid; seen on 7.3.4, not on 6.12.117",
    ),
)


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds on one kernel. Each field is an entry of the table above."""

    mirrored_source_moves: bool
    second_init_invalid: bool
    init_errors_shown: bool
    vm_types: bool
    vcpu_creation_busy: bool
    vcpu_creation_locked: bool
    vmsa_creation_busy: bool
    vmsa_once: bool
    irqfd_unique: bool


def rules(kernel: str) -> Rules:
    """Of a kernel "x.y.z". Raises `UsageError` if that is no version."""
    version = parse(kernel)
    return Rules(**{difference.name: has(version, difference) for difference in DIFFERENCES})


def parse(kernel: str) -> Version:
    """(6, 12, 117) of "6.12.117" or "6.12.117-amd64"; a missing last number is 0."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?![\w.])", kernel)
    if found is None:
        raise UsageError(f"{kernel!r} is no version of a kernel", remedy="a version is like 6.12.117")
    major, minor, patch = found.groups(default="0")
    return int(major), int(minor), int(patch)


def has(version: Version, difference: Difference) -> bool:
    backport = next((stable for stable in difference.stable if stable[:2] == version[:2]), None)
    return version >= (backport or difference.mainline)
