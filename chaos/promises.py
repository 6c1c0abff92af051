# SPDX-License-Identifier: Apache-2.0
"""The promises of the kernel contract (docs/contract.md)."""

from __future__ import annotations

PROMISES: dict[str, str] = {
    "P1": "balance: an ASID in use is charged once, to the cgroup that owns it",
    "P2": "one charge per ASID: a mirror pays nothing",
    "P3": "dead source: after a move every ioctl on the source fails with EIO",
    "P4": "one owner: exactly one VM owns the context",
    "P5": "the guest goes on at the destination where it stopped",
    "P6": "failure is clean: a move that fails changes nothing",
    "P7": "errors: each refusal has its documented errno",
    "P8": "no deadlock: moves end, a fatal signal ends a waiting one",
    "P9": "nothing leaks after the last close",
    "P10": "limits: misc.max stops a charge and counts an event",
    "P11": "charges stay when a task changes its cgroup",
    "P12": "a quiet kernel: no WARN, oops, hang or panic",
    "P13": "no firmware traffic: a move sends the PSP nothing",
    "P14": "within bounds: nobody writes beyond the length that a caller told",
}
