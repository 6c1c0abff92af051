# SPDX-License-Identifier: Apache-2.0
"""Where the members of a module's structures are, as the kernel itself says: BTF, of which each module has a part.

    <root>/vmlinux     the kernel's own types
    <root>/MODULE      the module's, whose names begin where those of vmlinux end

Only structures that the module itself defines are looked for, so the tens of thousands of types of vmlinux are not
read. The format is described in the kernel's Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path("/sys/kernel/btf")

_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")  # magic, version, flags, length; then where types and names are, and how long
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_STRUCT = 4
# What follows a type, in bytes: for each kind so much, and so much again for each of its members.
_FOLLOWS = {
    1: (4, 0), 2: (0, 0), 3: (12, 0), _STRUCT: (0, 12), 5: (0, 12), 6: (0, 8), 7: (0, 0), 8: (0, 0), 9: (0, 0),
    10: (0, 0), 11: (0, 0), 12: (0, 0), 13: (0, 8), 14: (4, 0), 15: (0, 12), 16: (0, 0), 17: (4, 0), 18: (0, 0),
    19: (0, 12),
}  # fmt: skip


class NoType(Exception):
    """The kernel does not say. Says what, in a line."""


@dataclass(frozen=True, slots=True)
class _Sections:
    types: int
    types_end: int
    names: int
    names_end: int

    @classmethod
    def read(cls, data: bytes, where: Path) -> _Sections:
        if len(data) < _HEADER.size or _HEADER.unpack_from(data)[0] != _MAGIC:
            raise NoType(f"{where} is no BTF")
        _, _, _, length, types, types_length, names, names_length = _HEADER.unpack_from(data)
        return cls(length + types, length + types + types_length, length + names, length + names + names_length)


class ModuleTypes:
    """The types of one module. Raises `NoType`, also where this kernel has no BTF."""

    def __init__(self, module: str, root: Path = ROOT) -> None:
        self._path = root / module
        try:
            self._data = self._path.read_bytes()
            with (root / "vmlinux").open("rb") as base:
                before = _Sections.read(base.read(_HEADER.size), root / "vmlinux")
                base.seek(before.names)
                self._base_names = base.read(before.names_end - before.names)
        except OSError as error:
            raise NoType(f"{error.filename}: {error.strerror}") from error
        self._sections = _Sections.read(self._data, self._path)

    def offset(self, structure: str, member: str) -> int:
        """Of a member that is a whole number of bytes away from the beginning, in bytes."""
        try:
            at, count, packed = self._structures[structure]
            bits = dict(self._members(at, count, packed))[member]
        except KeyError:
            raise NoType(f"{self._path} has no {structure}.{member}") from None
        if bits % 8:
            raise NoType(f"{self._path}: {structure}.{member} is a field of bits")
        return bits // 8

    @cached_property
    def _structures(self) -> dict[str, tuple[int, int, bool]]:
        """Where the members of each are, how many, and whether their sizes are packed beside their offsets."""
        found = {}
        at = self._sections.types
        while at < self._sections.types_end:
            name, info, _ = _TYPE.unpack_from(self._data, at)
            kind, count, packed = info >> 24 & 0x1F, info & 0xFFFF, bool(info >> 31)
            at += _TYPE.size
            if kind == _STRUCT:
                found[self._name(name)] = (at, count, packed)
            if kind not in _FOLLOWS:
                raise NoType(f"{self._path} has a type of kind {kind}, which is not known here")
            once, each = _FOLLOWS[kind]
            at += once + each * count
        return found

    def _members(self, at: int, count: int, packed: bool) -> Iterator[tuple[str, int]]:
        for number in range(count):
            name, _, offset = _MEMBER.unpack_from(self._data, at + number * _MEMBER.size)
            yield self._name(name), offset & 0xFFFFFF if packed else offset

    def _name(self, offset: int) -> str:
        """A name that vmlinux has too is kept there alone."""
        names, begin = self._base_names, offset
        if offset >= len(names):
            names, begin = self._data, self._sections.names + offset - len(names)
        return names[begin : names.index(b"\0", begin)].decode(errors="replace")
