# SPDX-License-Identifier: Apache-2.0
"""The edits that mend the findings: they change what they name, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.errors import InternalError, NoKernel
from chaos.judge import findings
from chaos.lab.kernel import edits
from chaos.lab.kernel.edits import Fix

SOURCE = """\
static int counted(struct thing *thing);
static int other(void)
{
	return counted(NULL);
}

static int
counted(struct thing *thing)
{
	int n = 0;
"a string of the log that begins a line;";
	n++;
	return n;
}

struct thing {
	int n;
};
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "file.c").write_text(SOURCE)
    return tmp_path


def made(tree: Path, text: str, series: str = "7.3") -> str:
    edits.apply([Fix("0001", edits.parse(text, "0001.edit"))], tree, series)
    return (tree / "dir" / "file.c").read_text()


def test_lines_take_the_place_of_others_in_the_function_that_is_named(tree: Path) -> None:
    changed = made(tree, "# why\nfile dir/file.c\nin counted\n-\tn++;\n-\treturn n;\n+\treturn n + 1;\n")
    assert changed == SOURCE.replace("\tn++;\n\treturn n;\n", "\treturn n + 1;\n")


def test_several_edits_of_a_file_and_of_a_structure(tree: Path) -> None:
    text = "file dir/file.c\nin thing\n-\tint n;\n+\tlong n;\n"
    text += "in counted\n-\tint n = 0;\n+\tlong n = 0;\n-\tn++;\n+\tn--;\n"
    changed = made(tree, text)
    assert "struct thing {\n\tlong n;\n}" in changed
    assert "\tlong n = 0;\n" in changed and "\tn--;\n" in changed
    assert changed.count("\n") == SOURCE.count("\n")


def test_a_declaration_and_a_call_are_no_definition(tree: Path) -> None:
    changed = made(tree, "file dir/file.c\nin counted\n-counted(struct thing *thing)\n+counted(void)\n")
    assert changed.startswith("static int counted(struct thing *thing);\n")
    assert "\nstatic int\ncounted(void)\n{\n" in changed


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ("file dir/file.c\nin counted\n-\tn--;\n+\tn;\n", r"in counted it is not there: 'n--;'"),
        ("file dir/file.c\nin other\n-\tn++;\n+\tn;\n", "in other it is not there"),
        ("file dir/file.c\nin nobody\n-\tn++;\n+\tn;\n", "in nobody it is not there"),
        ("file dir/none.c\nin counted\n-\tn++;\n+\tn;\n", "none.c: No such file"),
    ],
)
def test_what_does_not_fit_changes_nothing(tree: Path, edit: str, why: str) -> None:
    first = "file dir/file.c\nin thing\n-\tint n;\n+\tlong n;\n"
    with pytest.raises(NoKernel, match=why) as caught:
        made(tree, first + edit)
    assert "finding 0001" in caught.value.message
    assert (tree / "dir" / "file.c").read_text() == SOURCE


def test_a_line_that_is_there_twice_is_no_place(tree: Path) -> None:
    (tree / "dir" / "file.c").write_text(SOURCE.replace("\tn++;\n", "\tn++;\n\tn++;\n"))
    with pytest.raises(NoKernel, match="2 times there"):
        made(tree, "file dir/file.c\nin counted\n-\tn++;\n+\tn;\n")


def test_an_edit_may_be_for_some_series_alone(tree: Path) -> None:
    text = "file dir/file.c\nonly 6.12\nin counted\n-\tn++;\n+\tn--;\n"
    assert made(tree, text) == SOURCE
    assert "\tn--;\n" in made(tree, text, "6.12")


def test_other_kernels_than_they_were_written_for_are_refused(tree: Path) -> None:
    with pytest.raises(NoKernel, match=r"are of 6\.1$"):
        made(tree, "", "6.1")


def test_another_link_to_a_file_that_is_changed_keeps_it(tree: Path) -> None:
    (tree / "link.c").hardlink_to(tree / "dir" / "file.c")
    made(tree, "file dir/file.c\nin counted\n-\tn++;\n+\tn--;\n")
    assert (tree / "link.c").read_text() == SOURCE


@pytest.mark.parametrize("bad", ["file f\nin g\n+new\n", "in g\n-old\n", "file f\n-old\n", "file f\nin g\nold\n"])
def test_a_file_of_edits_that_cannot_be_read_is_our_fault(bad: str) -> None:
    with pytest.raises(InternalError, match=r"0001\.edit"):
        edits.parse(bad, "0001.edit")


def test_every_fix_is_of_a_finding_and_replaces_something() -> None:
    fixes = edits.fixes()
    assert {fix.finding for fix in fixes} <= {finding.id for finding in findings.load()}
    assert all(fix.edits for fix in fixes)
    for path in edits.FIXES.glob("*.edit"):
        assert path.read_text().startswith("# SPDX-License-Identifier: GPL-2.0-only\n")


def test_every_finding_that_no_kernel_of_the_series_has_mended_has_a_fix() -> None:
    """On `+fixed` nothing may be broken, so one without a fix would have to be stated."""
    for finding in findings.load():
        for series in edits.SERIES:
            if series in finding.kernels and not finding.kernels[series].fixed:
                fix = edits.BY_ANOTHER.get(finding.id, finding.id)
                found = [each for fixes in edits.fixes() if fixes.finding == fix for each in fixes.edits]
                assert any(not edit.series or series in edit.series for edit in found), (finding.id, series)


def test_an_edit_carries_none_of_the_kernels_text_but_what_it_replaces() -> None:
    """Each file has its own comment, names, and lines with - and +."""
    for path in edits.FIXES.glob("*.edit"):
        for line in path.read_text().splitlines():
            assert line.startswith(("#", "file ", "in ", "only ", "-", "+")) or not line, f"{path.name}: {line}"
