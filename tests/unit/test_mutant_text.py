# SPDX-License-Identifier: Apache-2.0
"""Mutants of the judge: which are of wording only, how one is told, and which survivors are known."""

from __future__ import annotations

import ast

import pytest

from tests.nightly import mutation
from tests.nightly.mutant_text import descriptors_apart, shown
from tests.nightly.mutation import ModuleScore, Mutant, read_known


def told(before: str, after: str) -> bool:
    """Whether the change of a function's only line is of wording."""
    code = f"def x_f__mutmut_orig(a):\n    {before}\ndef x_f__mutmut_1(a):\n    {after}\n"
    (mutant,) = shown(code).values()
    assert (mutant.function, mutant.before, mutant.after) == ("f", ast.unparse(ast.parse(before)), after)
    return mutant.wording


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("return 'two words'", "return 'TWO WORDS'"),
        ("return broken(f'it was {a}')", "return broken(f'it was {None}')"),
        ("return broken(f'it was {a}')", "return broken(None)"),
        ("return ', '.join(a)", "return 'XX, XX'.join(a)"),
    ],
)
def test_what_changes_nothing_but_a_text_for_people_is_wording(before: str, after: str) -> None:
    assert told(before, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("return 'word'", "return 'WORD'"),
        ("return broken(a, signature=f'it {a}')", "return broken(a, signature=f'it {None}')"),
        ("return broken(a, expected='no answer')", "return broken(a, expected=None)"),
        ("return a == 'two words'", "return a == 'TWO WORDS'"),
        ("return a.startswith('two words')", "return a.startswith('TWO WORDS')"),
        ("return broken('two words', a)", "return broken('two words', None)"),
        ("return broken('two words', a)", "return broken('two words')"),
    ],
)
def test_what_decides_is_no_wording(before: str, after: str) -> None:
    assert not told(before, after)


def test_a_method_is_told_with_its_class() -> None:
    code = "class A:\n def xǁAǁf__mutmut_orig(s): return 1\n def xǁAǁf__mutmut_2(s): return 2\n"
    (mutant,) = shown(code).values()
    assert mutant.function == "A.f"


def test_a_property_becomes_an_assignment_and_stays_one() -> None:
    source = "class A:\n    @property\n    def one(self):\n        return 1\n\n    def two(self):\n        return 2\n"
    apart = descriptors_apart(source)
    assert "@property" not in apart
    names: dict[str, type] = {}
    exec(apart, names)
    made = names["A"]()
    assert (made.one, made.two()) == (1, 2)


def test_a_survivor_is_read_as_it_is_told() -> None:
    mutant = Mutant("chaos/judge/parts.py", "A.f", "if a:\nreturn 1", "if not a:")
    assert read_known(f"# a list\n\n{mutant}\n  it is the same,\n  for a is true\n") == {
        mutant: "it is the same, for a is true"
    }


def test_a_survivor_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="no reason"):
        read_known(str(Mutant("chaos/judge/parts.py", "f", "1", "2")))


def test_the_survivors_that_are_known_are_of_modules_that_are_there() -> None:
    known = read_known(mutation.KNOWN.read_text())
    assert {mutant.module for mutant in known} <= {str(path) for path in mutation.modules()}


def test_a_sample_has_an_interval_and_all_mutants_have_none() -> None:
    score = ModuleScore("a.py", 200, 10, 100, 88, 2, (), 1)
    low, high = score.interval
    assert 0.82 < low < score.score == 0.9 < high < 0.95
    whole = ModuleScore("a.py", 100, 10, 100, 88, 2, (), 1)
    assert whole.interval == (0.9, 0.9)


def test_the_whole_is_weighed_by_the_mutants_of_each_module() -> None:
    small, large = ModuleScore("a.py", 30, 0, 30, 30, 0, (), 1), ModuleScore("b.py", 300, 0, 30, 15, 0, (), 1)
    score, (low, high) = mutation.overall([small, large])
    assert score == pytest.approx((30 + 150) / 330)
    assert low < score < high
    assert mutation.overall([small]) == (1.0, (1.0, 1.0))
