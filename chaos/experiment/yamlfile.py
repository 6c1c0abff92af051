# SPDX-License-Identifier: Apache-2.0
"""A YAML file as plain data, whatever file it is: small, of one document, without aliases, with each key once.

YAML allows more than a file of ours needs. Aliases let ten lines stand for a billion; of a key that is there twice one
is dropped in silence; and PyYAML follows brackets until the stack ends. All of these are refused here, with the place.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from chaos.errors import UsageError

LIMIT = 1 << 18  # bytes; the longest experiment of the catalogue has four thousand
DEPTH = 40


def read(path: Path, *, remedy: str) -> Any:
    """What the file says. Raises `UsageError`; `remedy` is for a path that leads nowhere."""
    text = _text(path, remedy)
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{path}: {_said(error)}", remedy="correct it there; docs/experiments.md shows how a file looks"
        ) from error


def _text(path: Path, remedy: str) -> str:
    data = _bytes(path, remedy)
    if len(data) > LIMIT:
        raise UsageError(
            f"{path} has more than {LIMIT >> 10} KiB", remedy="an experiment has a few: is it the right file?"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data.count(b"\n", 0, error.start)
        raise UsageError(
            f"{path}: line {before + 1}: the byte {data[error.start]:#04x} is not UTF-8", remedy="save it as UTF-8 text"
        ) from error
    for number, line in enumerate(text.splitlines(), start=1):
        odd = yaml.reader.Reader.NON_PRINTABLE.search(line)
        if odd:
            raise UsageError(f"{path}: line {number}: the character {odd[0]!a} is no text", remedy="remove it")
    return text


def _bytes(path: Path, remedy: str) -> bytes:
    """Up to one byte more than there may be. Nothing is waited for: a pipe is no file."""
    try:
        with open(path, "rb", opener=_open) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                kind = "a pipe" if stat.S_ISFIFO(mode) else "a device"
                raise UsageError(f"{path} is {kind}, not a file", remedy=remedy)
            return file.read(LIMIT + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", remedy=remedy) from error
    except ValueError as error:  # a null byte
        raise UsageError(f"{str(path)!a} is no path: {error}", remedy=remedy) from error


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _said(error: Exception) -> str:
    """In one line: where, and what is wrong there."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: {said}"
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _problem_at(f"*{event.anchor} is an alias: write it out", event.start_mark)
        self._depth += 1
        if self._depth > DEPTH:
            raise _problem_at(f"this is nested more than {DEPTH} deep", event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            mark = key.start_mark
            if key.tag != "tag:yaml.org,2002:str":
                shown = f"{key.value!r:.60}" if isinstance(key, yaml.ScalarNode) else "a list or a map"
                raise _problem_at(f"{shown} is no text, and no key: put it in quotes", mark)
            if key.value in seen:
                problem = f"the key {key.value!r:.60} is there twice, first in line {seen[key.value]}"
                raise _problem_at(problem, mark)
            seen[key.value] = mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # a date that is none, a number with thousands of digits
            why = "it has too many digits" if "digits" in str(error) else str(error)
            raise _problem_at(f"{str(node.value)[:60]!r}: {why}", node.start_mark) from error


def _problem_at(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
