# SPDX-License-Identifier: Apache-2.0
"""Structures that Python and C share: those of `native.h`, in its order. `library` compares the sizes when it loads."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_uint64

ERRNOS = 4096  # the kernel has no larger one


class CallRecord(ctypes.Structure):
    _fields_ = [("began", c_uint64), ("ended", c_uint64), ("call", c_uint32), ("error", c_uint32)]


RECORD = "=QQII"  # the same for the `struct` module


class Report(ctypes.Structure):
    _fields_ = [
        ("began", c_uint64),
        ("ended", c_uint64),
        ("calls", c_uint64),
        ("since", c_uint64),
        ("ticks", c_uint64),
        ("stale", c_uint64),
        ("first_tick", c_uint64),
        ("last_tick", c_uint64),
        ("sound", c_uint64),
        ("interrupted", c_uint64),
        ("early", c_uint64),
        ("ring", c_uint64),
        ("clock_error", c_uint64),
        ("tid", c_int32),
        ("call", c_uint32),
        ("why", c_uint32),
        ("detail", c_uint32),
    ]


class Head(ctypes.Structure):
    """Of a board, before its ring."""

    _fields_ = [("report", Report), ("errnos", c_uint64 * ERRNOS)]


class StepLayout(ctypes.Structure):
    _fields_ = [
        ("request", c_uint64),
        ("argument", c_uint64),
        ("size", c_uint64),
        ("fd", c_int32),
        ("reset", c_uint32),
    ]


class LoopPlan(ctypes.Structure):
    _fields_ = [
        ("steps", ctypes.POINTER(StepLayout)),
        ("count", c_uint64),
        ("rounds", c_uint64),
        ("ring", c_uint64),
        ("offset", c_uint64),
        ("meets", c_uint64 * (ERRNOS // 64)),
        ("more", c_uint64),
        ("cpu", c_int32),
        ("ends_all", c_uint32),
        ("nice", c_int64),
        ("counter", c_uint64),
    ]


SIZES = tuple(ctypes.sizeof(structure) for structure in (CallRecord, Report, Head, StepLayout, LoopPlan))
