# SPDX-License-Identifier: Apache-2.0
"""On a host that others share, what the firmware counts and how many contexts can be had is theirs too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

import experiments
from chaos.cgroup.group import Cgroup
from chaos.errors import Unsupported
from chaos.history.records import Filled, Header, History, Observation, Record
from chaos.judge.judge import judge
from chaos.judge.verdict import Outcome
from chaos.runner.script import moved_mirror, require_all
from faults.vmm import Oom
from tests.unit.core.build import moved, shipped

NAME = "move-across-cgroups"


def outcomes(change: Callable[[Record], Record]) -> dict[str, tuple[Outcome, str]]:
    told = moved()
    shared = History(tuple(change(record) for record in told.records))
    return {v.promise: (v.outcome, v.signature) for v in judge(shipped(NAME), shared).verdicts}


def others_share(record: Record) -> Record:
    if isinstance(record, Header):
        return msgspec.structs.replace(record, shared=True)
    return msgspec.structs.replace(record, guests=None) if isinstance(record, Observation) else record


def test_what_cannot_be_asked_there_is_skipped_and_the_rest_holds() -> None:
    found = outcomes(others_share)
    assert found["P4"][0] is found["P9"][0] is Outcome.SKIPPED
    assert found["P1"][0] is found["P3"][0] is Outcome.KEPT


def test_fewer_contexts_may_be_the_work_of_others() -> None:
    def fewer(record: Record) -> Record:
        record = others_share(record)
        if isinstance(record, Filled) and record.label == "end":
            return msgspec.structs.replace(record, count={key: number - 1 for key, number in record.count.items()})
        return record

    assert outcomes(fewer)["P9"][0] is Outcome.UNKNOWN


def test_a_charge_of_ours_that_stays_is_ours_all_the_same() -> None:
    def left(record: Record) -> Record:
        record = others_share(record)
        if isinstance(record, Observation) and record.label == "end":
            misc = {name: {**files, "current": {"sev": 1, "sev_es": 0}} for name, files in record.misc.items()}
            return msgspec.structs.replace(record, misc=misc)
        return record

    assert outcomes(left)["P9"] == (Outcome.BROKEN, "charge-left:sev+skipped:asids-of-others+skipped:guests-of-others")


@pytest.mark.parametrize(
    "step",
    [
        {"do": "fault", "fault": "firmware", "options": {"plan": "INIT=stall"}},
        {"do": "arm", "hold": "h", "kernel": {"function": "misc_cg_try_charge"}},
    ],
)
def test_what_strikes_the_whole_host_is_not_done_there(step: dict[str, object]) -> None:
    experiment = msgspec.convert({**msgspec.to_builtins(shipped(NAME)), "script": [step]}, type(shipped(NAME)))
    with pytest.raises(Unsupported, match="this one is shared with others"):
        require_all(experiment.script, SimpleNamespace(shared=True))


def moving_mirrors(name: str) -> str:
    return moved_mirror(shipped(name).script)


def test_a_mirror_is_not_moved_where_others_need_the_asid_that_it_may_cost() -> None:
    script = shipped("move-a-mirror").script
    with pytest.raises(Unsupported, match="the mirror old may cost the host an ASID until its next boot"):
        require_all(script, SimpleNamespace(shared=True))
    require_all(script, SimpleNamespace(shared=False))
    assert moving_mirrors("mirror-made-during-moves") == moving_mirrors("move-with-mirror") == ""


@pytest.mark.parametrize(("ours", "shared", "refused"), [("misc", True, True), ("misc memory", True, False),
                                                         ("misc", False, False)])  # fmt: skip
def test_a_controller_is_not_enabled_for_the_cgroups_of_others(
    tmp_path: Path, ours: str, shared: bool, refused: bool
) -> None:
    run = tmp_path / "sevchaos" / "run"
    run.mkdir(parents=True)
    for path, controllers in ((tmp_path, "misc memory"), (run.parent, ours), (run, "misc")):
        (path / "cgroup.controllers").write_text(controllers)
    ctx = SimpleNamespace(shared=shared, cgroups={".": Cgroup.at(run)})
    expected = pytest.raises(Unsupported, match="enabled for the cgroups of others") if refused else nullcontext()
    with expected:
        Oom().require(ctx, "source")


def test_no_command_is_sent_to_a_platform_that_others_need() -> None:
    script = experiments.find("device-tiny-buffers").script
    with pytest.raises(
        Unsupported, match=r"GET_ID2 of /dev/sev may cost a host SEV until its next boot .finding 0010."
    ):
        require_all(script, SimpleNamespace(shared=True))
    require_all(script, SimpleNamespace(shared=False))


def test_a_guest_is_debugged_only_where_the_firmware_is_ours() -> None:
    """A real one would write into the machine's own memory, on a kernel that has it do so."""
    script = experiments.find("debug-offsets").script

    def refuse() -> None:
        raise Unsupported("the firmware is a real one", remedy="use the lab")

    for shared in (False, True):
        with pytest.raises(Unsupported, match=r"dbg_decrypt may have the firmware write .* .finding 0011."):
            require_all(script, SimpleNamespace(shared=shared, firmware=SimpleNamespace(require=refuse)))
    require_all(script, SimpleNamespace(shared=False, firmware=SimpleNamespace(require=lambda: None)))
