# SPDX-License-Identifier: Apache-2.0
"""The mutants of one module, and which of them a test kills: `python -m tests.nightly.mutants MODULE.py RESULT.json`.

mutmut makes the mutants: all of a module are in one source with the original, and a variable chooses. They are tried in
a loop of our own. mutmut's runs the tests several times in one process, which tests with a parameter that counts do not
bear, and it needs minutes before it begins. Here the tests are collected once with the mutants in place of the module,
and a child is forked for each mutant, in which they run until one fails: those that killed most so far come first.

It is a process by itself, for nothing of `chaos` may be imported before the mutants are.

Left out: tests of Hypothesis (a mutant that chance kills is not killed every night), tests that fail with the original
in this shape (they look at the code of functions), mutants of wording (mutant_text.Shown), and of functions that are
called while the module is imported, and then only. mutmut changes the bodies of functions: tables are not mutated.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import click
import pytest
from _pytest.runner import runtestprotocol
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state

from tests.nightly.mutant_text import Shown, descriptors_apart, shown

ROOT = Path(__file__).parent.parent.parent
TESTS = ROOT / "tests" / "unit" / "core"
OF_THE_JUDGE = ("chaos.judge", "core.doctored", "core.on_ledger")
# Whose tests they are, "" of nothing that is mutated. Any change to the oracle makes another page of it, which is no
# test of the oracle.
OF_OTHERS = {
    "test_contract_page.py": "chaos/judge/oracle/page.py",
    "test_every_fault_strikes.py": "",
    "test_outcomes.py": "",
    "test_reports.py": "",
}
_MEMORY = 4 << 30


@dataclass(slots=True)
class Result:
    """What became of the mutants that were tried, in lists of (function, before, after)."""

    module: str
    mutants: int = 0
    wording: int = 0
    at_import: int = 0
    tried: int = 0
    killed: int = 0
    timeout: int = 0
    survived: list[tuple[str, str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: int = 0


# The module in another shape


class _Loader(SourceLoader):
    def __init__(self, path: Path, code: str) -> None:
        self.path, self.code = path, code

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str | bytes) -> bytes:
        return self.code.encode()


class _Finder(MetaPathFinder):
    def __init__(self, name: str, path: Path, code: str) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        return spec_from_file_location(fullname, self.path, loader=_Loader(self.path, self.code))


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


# The loop


class _Loop:
    """A pytest plugin that tries each mutant instead of running the tests once."""

    def __init__(self, module: str, mutants: dict[str, Shown], result: Result) -> None:
        self.module, self.mutants, self.result = module, mutants, result
        self.kills: Counter[int] = Counter()
        self.items: list[pytest.Item] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if not item.get_closest_marker("hypothesis")]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        assert not session.testsfailed, "the tests cannot be collected"
        self.items = session.items
        at_import = set(state()._stats)
        covering, seconds = self._trace()
        gc.freeze()
        for name, mutant in self.mutants.items():
            function = f"{self.module}.{name.rpartition('__mutmut_')[0]}"
            if function in at_import and not covering[function]:
                self.result.at_import += 1
                continue
            tests = sorted(covering[function], key=lambda test: -self.kills[test])
            limit = 5 + int(5 * sum(seconds[test] for test in tests))
            self._count(mutant, self._try(name, tests, limit))
        return True

    def _trace(self) -> tuple[dict[str, list[int]], list[float]]:
        """Which tests call which function, and how long each takes. In a child: a test runs once in a process."""
        answer = _in_child(self._traced, limit=3600)
        covering: dict[str, list[int]] = defaultdict(list)
        seconds = []
        assert isinstance(answer, list) and len(answer) == len(self.items), "a child could not trace the tests"
        for number, (well, took, functions) in enumerate(answer):
            seconds.append(took)
            if not well:
                self.result.left_out.append(self.items[number].nodeid)
                continue
            for function in functions:
                covering[function].append(number)
        return covering, seconds

    def _traced(self) -> object:
        traced = []
        for item, following in pairwise([*self.items, None]):
            assert item is not None
            state()._stats.clear()
            began = time.process_time()
            well = _passes(item, following)
            traced.append((well, time.process_time() - began, sorted(state()._stats)))
        return traced

    def _try(self, name: str, tests: Sequence[int], limit: int) -> object:
        """The number of the test that fails with this mutant, None if none does, "timeout"."""

        def tried() -> object:
            set_mutant_under_test(f"{self.module}.{name}")
            items: list[pytest.Item | None] = [*(self.items[test] for test in tests), None]
            for test, (item, following) in zip(tests, pairwise(items), strict=True):
                if item is not None and not _passes(item, following):
                    return test
            return None

        return _in_child(tried, limit=limit)

    def _count(self, mutant: Shown, outcome: object) -> None:
        self.result.tried += 1
        if outcome is None:
            self.result.survived.append((mutant.function, mutant.before, mutant.after))
            print(f"survived: {mutant.function}\n- {mutant.before}\n+ {mutant.after}", flush=True)
        elif outcome == "timeout":
            self.result.timeout += 1
        else:
            self.result.killed += 1
            if isinstance(outcome, int):
                self.kills[outcome] += 1


def _passes(item: pytest.Item, following: pytest.Item | None) -> bool:
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


def _in_child(do: Callable[[], object], *, limit: int) -> object:
    """What `do` returns, as it is in JSON; "timeout" if it wants more CPU than `limit` seconds, "died" if it dies."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reads)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
            with os.fdopen(writes, "w") as pipe:
                json.dump(do(), pipe)
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "died"
    return json.loads(said) if said else "died"


def _rank(seed: int, path: Path, mutant: Shown) -> str:
    """Where the mutant stands in the order of a seed: by chance, and at the same place when others come or go, so that
    an edit elsewhere leaves a sample as it is."""
    told = f"{seed} {path} {mutant.function}\n{mutant.before}\n{mutant.after}"
    return hashlib.sha256(told.encode()).hexdigest()


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("written", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--sample", default=0, metavar="N", help="Only N of the mutants. [default: all]")
@click.option("--seed", default=0, metavar="S", help="Which N.")
@click.option("--function", "functions", multiple=True, metavar="NAME", help="Only its mutants. Repeatable.")
@click.option("--survivors", is_flag=True, help="Only those that survived by the result that is there.")
def main(path: Path, written: Path, sample: int, seed: int, functions: tuple[str, ...], survivors: bool) -> None:
    """Try the mutants of one module and write what became of them."""
    os.chdir(ROOT)
    code = mutate_file_contents(str(path), descriptors_apart(path.read_text())).code
    mutants = shown(code)
    result = Result(str(path), mutants=len(mutants), wording=sum(each.wording for each in mutants.values()))
    chosen = {name: each for name, each in mutants.items() if not each.wording}
    if functions:
        chosen = {name: each for name, each in chosen.items() if each.function in functions}
    if survivors:
        known = {tuple(each) for each in json.loads(written.read_text())["survived"]}
        chosen = {name: m for name, m in chosen.items() if (m.function, m.before, m.after) in known}
    if sample:
        chosen = dict(sorted(chosen.items(), key=lambda item: _rank(seed, path, item[1]))[:sample])
    sys.meta_path.insert(0, _Finder(module_name(path), path, code))
    set_mutant_under_test("stats")
    began = time.monotonic()
    files = [str(f) for f in sorted(TESTS.glob("test_*.py")) if any(n in f.read_text() for n in OF_THE_JUDGE)]
    files = [file for file in files if OF_OTHERS.get(Path(file).name, str(path)) == str(path)]
    arguments = ["-q", "-s", "-p", "no:cacheprovider", "-m", "not lab and not nightly"]
    ended = pytest.main([*arguments, *files], plugins=[_Loop(module_name(path), chosen, result)])
    result.seconds = int(time.monotonic() - began)
    if ended != 0:
        sys.exit(int(ended))
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
