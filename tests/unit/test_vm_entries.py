# SPDX-License-Identifier: Apache-2.0
"""The count of entries into guests: what BTF says of structures, and what the tracer says in its histograms."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from chaos.linux.btf import ModuleTypes, NoType
from chaos.linux.tracefs import NoTracing
from chaos.linux.vm_entries import VmEntries, parse

BASE_NAMES = b"\0asid\0"  # of vmlinux; a module's own begin after them
INT, STRUCT, ENUM64 = 1, 4, 19


def btf(types: bytes, names: bytes) -> bytes:
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names)) + types + names


def type_of(name: int, kind: int, members: int = 0, size: int = 4, *, packed: bool = False) -> bytes:
    return struct.pack("<III", name, packed << 31 | kind << 24 | members, size)


def member(name: int, offset: int) -> bytes:
    return struct.pack("<III", name, 1, offset)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`vcpu_svm` with `asid`, whose name vmlinux has too, and `bits`; `packed` with `last`."""
    (tmp_path / "vmlinux").write_bytes(btf(type_of(1, INT) + bytes(4), BASE_NAMES))
    names = b"vcpu_svm\0bits\0packed\0last\0"
    own, last = len(BASE_NAMES), len(BASE_NAMES) + names.index(b"last")
    bits, packed = own + names.index(b"bits"), own + names.index(b"packed")
    types = type_of(0, INT) + bytes(4) + type_of(0, ENUM64, 2) + bytes(24)
    types += type_of(own, STRUCT, 2) + member(1, 6600 * 8) + member(bits, 6604 * 8 + 3)
    types += type_of(packed, STRUCT, 1, packed=True) + member(last, 7 << 24 | 24 * 8)
    (tmp_path / "kvm_amd").write_bytes(btf(types, names))
    return tmp_path


def test_where_a_member_is(root: Path) -> None:
    types = ModuleTypes("kvm_amd", root)
    assert types.offset("vcpu_svm", "asid") == 6600
    assert types.offset("packed", "last") == 24


@pytest.mark.parametrize(
    ("structure", "name", "told"),
    [
        ("vcpu_svm", "generation", "has no vcpu_svm.generation"),
        ("nothing", "asid", "has no nothing.asid"),
        ("vcpu_svm", "bits", "vcpu_svm.bits is a field of bits"),
    ],
)
def test_what_is_not_there(root: Path, structure: str, name: str, told: str) -> None:
    with pytest.raises(NoType, match=told):
        ModuleTypes("kvm_amd", root).offset(structure, name)


def test_a_kernel_without_btf(tmp_path: Path) -> None:
    with pytest.raises(NoType, match="No such file"):
        ModuleTypes("kvm_amd", tmp_path)
    (tmp_path / "kvm_amd").write_bytes(b"no BTF, but long enough for one")
    (tmp_path / "vmlinux").write_bytes(b"no BTF, but long enough for one")
    with pytest.raises(NoType, match="vmlinux is no BTF"):
        ModuleTypes("kvm_amd", tmp_path)


HISTOGRAMS = """\
# event histogram
#
# trigger info: hist:keys=vcpu,asid,generation:vals=hitcount:sort=hitcount:size=4096 if common_cpu == 1 [active]
#

{ vcpu: ffff888004a00000, asid:          9, generation:          2 } hitcount:          3
{ vcpu: ffff888004a00000, asid:          9, generation:          5 } hitcount:          1
{ vcpu: ffff888004a10000, asid:          9, generation:          5 } hitcount:          7
{ vcpu: ffff888004a08000, asid:          3, generation:          0 } hitcount:       1200

Totals:
    Hits: 1203
    Entries: 2
    Dropped: 0


# event histogram
#
# trigger info: hist:keys=vcpu,common_pid:vals=hitcount:sort=hitcount:size=4096 if common_cpu == 1 [active]
#

{ vcpu: ffff888004a08000, common_pid:        171 } hitcount:       1000
{ vcpu: ffff888004a08000, common_pid:        168 } hitcount:        200
{ vcpu: ffff888004a00000, common_pid:        175 } hitcount:          3
{ vcpu: ffff888004a10000, common_pid:        177 } hitcount:          7

Totals:
    Hits: 1203
    Entries: 3
    Dropped: 0
"""


def test_what_the_tracer_counted() -> None:
    of_sev = VmEntries(0, (168, 171), 3, frozenset(), frozenset(), 1200)
    one = VmEntries(1, (175,), 9, frozenset({2, 5}), frozenset({5}), 4)
    other = VmEntries(2, (177,), 9, frozenset({5}), frozenset({5}), 7)
    assert set(parse(HISTOGRAMS)) == {of_sev, one, other}


@pytest.mark.parametrize("text", [HISTOGRAMS.replace("Dropped: 0", "Dropped: 7", 1), HISTOGRAMS[:400], ""])
def test_what_it_had_no_room_for_is_not_passed_over(text: str) -> None:
    with pytest.raises(NoTracing, match="no room"):
        parse(text)
