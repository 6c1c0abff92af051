# SPDX-License-Identifier: Apache-2.0
"""The source of a module as mutmut bears it, and the mutants in what mutmut makes of it, as they are told."""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass

ORIGINAL = "__mutmut_orig"
_BEHAVIOUR = ("expected", "seen", "signature")
_TAKE_APART = ("startswith", "endswith", "partition", "rpartition", "removeprefix", "removesuffix", "split", "find")
_DESCRIPTORS = ("property", "cached_property")


@dataclass(frozen=True, slots=True)
class Shown:
    """A mutant as it is told: the function, and the lines before and after, as ast.unparse() writes them.

    `wording`: it changes nothing but a text for people, that is a string with a space in it, or what is put into one,
    unless that is what was expected, what was seen or a signature.
    """

    function: str
    before: str
    after: str
    wording: bool


def descriptors_apart(source: str) -> str:
    """The same module with `@property` written as an assignment below the function: mutmut leaves decorated functions
    alone. The lines keep their numbers."""
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.decorator_list) != 1:
            continue
        decorator = node.decorator_list[0]
        if isinstance(decorator, ast.Name) and decorator.id in _DESCRIPTORS:
            assert node.end_lineno is not None
            lines[decorator.lineno - 1] = ""
            lines[node.end_lineno - 1] += f"\n{' ' * node.col_offset}{node.name} = {decorator.id}({node.name})"
    return "\n".join(lines)


def shown(code: str) -> dict[str, Shown]:
    """Each mutant in the code that mutmut made, by its name."""
    functions = {node.name: node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)}
    found = {}
    for name, node in functions.items():
        of, mutated, number = name.rpartition("__mutmut_")
        if mutated and number.isdigit():
            found[name] = _shown(of, functions[of + ORIGINAL], node)
    return found


def _shown(name: str, original: ast.FunctionDef, mutant: ast.FunctionDef) -> Shown:
    old, new = _lines(original), _lines(mutant)
    changes = [line for line in difflib.ndiff(old, new) if line[0] in "+-"]
    before, after = ("\n".join(line[2:].strip() for line in changes if line[0] == sign) for sign in "-+")
    function = name.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    both = ([function_.args, *function_.body] for function_ in (original, mutant))
    return Shown(function, before, after, wording=_wording(*both))


def _lines(function: ast.FunctionDef) -> list[str]:
    return [ast.unparse(function.args), *(line for node in function.body for line in ast.unparse(node).split("\n"))]


def _wording(old: object, new: object, *, text: bool = False) -> bool:
    """Whether all that differs is inside of a text. `text`: both already are."""
    if not text and _decides(old):
        return isinstance(old, ast.AST) and isinstance(new, ast.AST) and ast.dump(old) == ast.dump(new)
    text = text or _is_text(old)
    if text or type(old) is not type(new):
        return text
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_wording, old, new))
    if isinstance(old, ast.AST):
        return all(_wording(getattr(old, name, None), getattr(new, name, None)) for name in old._fields)
    return old == new


def _decides(node: object) -> bool:
    """Whether a string in it decides something, or is compared."""
    if isinstance(node, ast.keyword):
        return node.arg in _BEHAVIOUR
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _TAKE_APART
    return called or isinstance(node, ast.Compare)


def _is_text(node: object) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and " " in node.value
    return isinstance(node, ast.JoinedStr) and any(_is_text(part) for part in node.values)
