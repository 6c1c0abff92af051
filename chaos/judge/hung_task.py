# SPDX-License-Identifier: Apache-2.0
"""Whether a task that the kernel reports as hung was kept asleep by the experiment.

khungtaskd reports whoever has slept uninterruptibly for longer than kernel.hung_task_timeout_secs, and then shows the
stack. An experiment may cause just that: a command that the firmware was told to stall or delay, a page that is not
there, and whoever waits for a lock behind one of them. Such a report is put down to the experiment if what kept it
asleep had begun when the task went to sleep and was still there when it was reported, and if the task is the very one
that was held, or its stack says that it waits for such a thing. A hold that was let go explains nothing any more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest

from chaos.experiment.model import Experiment
from chaos.experiment.steps import HoldStep, walk
from chaos.history.records import Console, Done, Exited, Firmware, Held, Kernel, Released
from chaos.judge.evidence import RunEvidence

_HUNG = re.compile(
    r"INFO: task (?P<comm>.+):(?P<tid>\d+) blocked (?:in I/O wait )?for more than (?P<after>\d+) seconds"
)
# What is behind a question mark was found on the stack and may be of an earlier call. A console has the time in front,
# and perhaps who said it.
_FRAME = re.compile(r"^(?:\[[^]]*\])*\s*(?P<function>[A-Za-z_][\w.]*)\+0x[0-9a-f]+/0x")
_DELAY = re.compile(r"delay:(?P<much>\d+)(?P<unit>ms|s)")
_STACK_LINES = 60
NS = 1_000_000_000
NEVER = 1 << 62  # later than any record
_UNITS = {"s": NS, "ms": NS // 1000}
# A hold is recorded when it is seen from outside, which is later than it began.
SEEN_WITHIN = 2 * NS

_FIRMWARE = re.compile(r"^(?:__)?sev_(?:do_cmd|wait_cmd|issue_cmd|platform|get_|dbg_|launch_)|^__sev_|^psp_")
_PAGE = re.compile(r"^handle_userfault")
_LOCK = re.compile(r"^_*(?:mutex_lock|rwsem_down|down_(?:read|write)|sev_lock|kvm_lock)")
_OURS = re.compile(r"^(?:kvm|sev|svm|misc_cg|__x64_sys_ioctl|do_vfs_ioctl)")


def kept_asleep(evidence: RunEvidence, line: Kernel | Console) -> str:
    """What of the experiment kept the task asleep that this line reports as hung, "" if nothing or if there is none."""
    found = _HUNG.search(line.text)
    if found is None:
        return ""
    tid, slept = int(found["tid"]), line.t - int(found["after"]) * NS
    stack = tuple(_stack(evidence, line))
    for held in _holds(evidence, line.t, slept):
        done = evidence.history.done(held.op)
        if (done is not None and done.tid == tid) or _fits(held.place, stack):
            return f"the hold {held.hold!r}"
    for command, until in _slow_commands(evidence):
        if command.began and command.began - SEEN_WITHIN <= slept and line.t <= until and _fits("firmware", stack):
            return f"{command.command}, which the firmware was told to answer late ({command.fault})"
    return ""


def hung(line: Kernel | Console) -> int | None:
    """The thread that this line reports as hung, None if it reports none."""
    found = _HUNG.search(line.text)
    return None if found is None else int(found["tid"])


def cannot_tell(experiment: Experiment, evidence: RunEvidence, line: Kernel | Console) -> str:
    """Why nobody can say whether the task was kept asleep on purpose. A hold of the script is not on record; or it
    waits for the firmware, and the word of who stands between that and the driver, which comes at the end of a run in
    a lab, is not there, or not all of it. "" if nothing is missing."""
    history = evidence.history
    if hung(line) is None:
        return ""
    held = {(r.step, r.hold) for r in history.records if isinstance(r, Held)}
    for number, step in walk(experiment.script):
        carried_out = history.end is not None and history.end.complete
        if isinstance(step, HoldStep) and carried_out and (number, step.at) not in held:
            return f"The hold {step.at!r} of step {number} is not on record, so nobody can say what kept it asleep"
    if not _fits("firmware", tuple(_stack(evidence, line))):
        return ""
    alone = history.header is not None and history.header.host != "lab"  # nobody could tell the firmware anything
    there = history.end is not None and (alone or evidence.contexts.whole)
    if not there:
        lost = "What the firmware was told to do with its commands was lost"
    elif not all(command.began for command, _ in _slow_commands(evidence)):
        lost = "When the firmware was sent what it answered late is not on record"
    else:
        return ""
    return f"{lost}, so nobody can say what kept it asleep"


def _fits(place: str, stack: tuple[str, ...]) -> bool:
    """Whether a task with this stack waits for what a hold of that kind keeps, or for a lock behind it."""
    behind = any(map(_LOCK.search, stack)) and any(map(_OURS.search, stack))
    if place == "firmware":
        return behind or any(map(_FIRMWARE.search, stack))
    if place == "page":
        return behind or any(map(_PAGE.search, stack))
    return behind


def _stack(evidence: RunEvidence, line: Kernel | Console) -> Iterator[str]:
    """The functions that the kernel printed below the report, up to the next."""
    lines = (r for r in evidence.history.records if isinstance(r, Kernel | Console) and type(r) is type(line))
    later = [record for record in lines if record.seq > line.seq]
    for record in later[:_STACK_LINES]:
        if _HUNG.search(record.text):
            return
        found = _FRAME.match(record.text)
        if found is not None:
            yield found["function"]


def _holds(evidence: RunEvidence, at: int, slept: int) -> Iterator[Held]:
    """The holds that were reached by the time the task went to sleep, and kept their operation at `at`."""
    for held in evidence.history.records:
        if isinstance(held, Held) and held.reached and held.t <= slept + SEEN_WITHIN and _until(evidence, held) >= at:
            yield held


def _until(evidence: RunEvidence, held: Held) -> int:
    """When the hold was let go, or its operation over; `NEVER` if neither was."""
    agents = {invoke.agent for invoke, _ in evidence.operations if invoke.op == held.op}
    for record in evidence.history.records[held.seq + 1 :]:
        released = isinstance(record, Released) and record.hold == held.hold
        answered = isinstance(record, Done) and record.op == held.op
        if released or answered or (isinstance(record, Exited) and record.agent in agents):
            return record.t
    return NEVER


def _slow_commands(evidence: RunEvidence) -> Iterator[tuple[Firmware, int]]:
    """The commands that the firmware was told to answer late or never, each with when it may have answered: it takes
    one at a time."""
    commands = sorted((r for r in evidence.history.records if isinstance(r, Firmware)), key=lambda r: r.order)
    for command, later in zip_longest(commands, commands[1:]):
        found = _DELAY.search(command.fault)
        if "stall" in command.fault:
            yield command, (later.began if later is not None else 0) or NEVER
        elif found is not None:
            yield command, command.began + int(found["much"]) * _UNITS[found["unit"]] + SEEN_WITHIN
