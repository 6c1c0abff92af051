# SPDX-License-Identifier: Apache-2.0
"""Choosing experiments by an expression like `kill and not network`.

A word stands for the experiments it is said of: their kind (resilience), a fault they apply, a promise they put to the
test (P3), a kind of guest (sev-es), or any part of their name. `and`, `or`, `not` and brackets are Python's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Set as AbstractSet

from chaos.errors import UsageError
from chaos.experiment.model import Experiment
from chaos.experiment.steps import FaultStep, walk

_REMEDY = "words, joined by and, or, not and brackets: kill and not (network or firmware)"


def tags(kind: str, experiment: Experiment) -> frozenset[str]:
    """The words that are said of it, in lower case."""
    faults = {step.fault for _, step in walk(experiment.script) if isinstance(step, FaultStep)}
    guests = {vm.kind.value for vm in experiment.vms.values()}
    return frozenset(word.lower() for word in {kind, *faults, *guests, *experiment.promises})


def matches(expression: str, name: str, words: AbstractSet[str]) -> bool:
    """Whether the expression is true of an experiment of this name and these tags. Raises `UsageError`."""
    # Dashes are part of words here; Python's grammar takes underscores for that.
    text = re.sub(r"(?<=\w)-(?=\w)", "_", expression.strip())
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"--select {expression!r} cannot be read", remedy=_REMEDY) from error

    def true(node: ast.expr) -> bool:
        match node:
            case ast.BoolOp(op=ast.And()):
                return all(true(value) for value in node.values)
            case ast.BoolOp():
                return any(true(value) for value in node.values)
            case ast.UnaryOp(op=ast.Not()):
                return not true(node.operand)
            case ast.Name():
                word = node.id.replace("_", "-").lower()
                return word in words or word in name
        raise UsageError(f"--select {expression!r}: {ast.unparse(node)!r} is no word", remedy=_REMEDY)

    return true(tree)
