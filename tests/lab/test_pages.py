# SPDX-License-Identifier: Apache-2.0
"""What README and the pages of findings show is what a run says. `run --all` is the nightly's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.errors import ExitCode
from chaos.linux.version import series
from tests.lab.conftest import Sevchaos, skip_unless_built
from tests.pages import FINDINGS, FIRMWARE, LAB, README, commands, output

pytestmark = pytest.mark.lab


def test_the_readme_s_run_ends_well(sevchaos: Sevchaos, tmp_path: Path) -> None:
    (arguments,) = (c for c in commands(README) if c[:2] == ["run", "move-across-cgroups"])
    done = sevchaos(*arguments, "--runs", str(tmp_path))
    assert done.returncode == ExitCode.KEPT, done.stdout.decode() + done.stderr.decode()


def test_the_readme_s_table_is_what_the_run_prints(sevchaos: Sevchaos, tmp_path: Path) -> None:
    arguments, shown = output(README)
    done = sevchaos(*arguments, "--runs", str(tmp_path))
    assert done.returncode == ExitCode.BROKEN, done.stderr.decode()
    printed = [" ".join(line.split()) for line in done.stdout.decode().splitlines()]
    assert shown and all(line in printed for line in shown), [line for line in shown if line not in printed]


def reproducers() -> Iterator[Any]:
    """By page and arguments. One that names a kernel is for the night, with the others of its series: it may have been
    mended since, and then it has to be fetched, and goes from the archive some day."""
    for page in FINDINGS:
        for arguments in (found for found in commands(page) if found[0] == "run"):
            kernel = arguments[arguments.index("--kernel") + 1] if "--kernel" in arguments else ""
            night = [pytest.mark.nightly] if kernel else []
            of = kernel and f"-debian:{'built' if '+' in kernel else series(kernel.removeprefix('debian:'))}-"
            yield pytest.param(page, arguments, id=f"{page.stem[:4]}{of}", marks=night)


@pytest.mark.parametrize(("page", "arguments"), list(reproducers()))
def test_the_reproducer_of_a_finding_breaks_a_promise_as_the_page_says(
    page: Path, arguments: list[str], sevchaos: Sevchaos, tmp_path: Path
) -> None:
    for kernel in (word for word in arguments if word.startswith("debian:") and "+" in word):
        skip_unless_built(kernel)
    done = sevchaos(*arguments, "--runs", str(tmp_path), within=4000.0)
    assert done.returncode == ExitCode.BROKEN, done.stderr.decode()
    said = "".join(done.stdout.decode().split())
    signatures = re.findall(r"^\| breaks \| P\d+, `(.*)` \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert any(f"signature:{signature}" in said for signature in signatures), said[-2000:]


def test_the_page_of_the_lab_shows_what_its_commands_print(sevchaos: Sevchaos) -> None:
    """Of its commands the two that take nothing of the reader's own; the second says how many ASIDs it was given."""
    page = LAB.read_text(encoding="utf-8")
    first, many = (c for c in commands(LAB) if c[:2] == ["lab", "run"] and not any("./" in word for word in c))
    done = sevchaos(*first)
    assert done.returncode == 0 and f"misc.capacity\n{done.stdout.decode()}$ sevchaos" in page
    asids = many[many.index("--asids") + 1]
    assert f" {asids} SEV and" in sevchaos(*many).stdout.decode()


def test_the_page_of_the_firmware_delays_a_whole_run(sevchaos: Sevchaos, tmp_path: Path) -> None:
    (arguments,) = (c for c in commands(FIRMWARE) if c[0] == "run")
    done = sevchaos(*arguments, "--accept-known", "--runs", str(tmp_path), "--seed", "7")  # chance may strike nothing
    assert done.returncode == ExitCode.KEPT, done.stdout.decode() + done.stderr.decode()
