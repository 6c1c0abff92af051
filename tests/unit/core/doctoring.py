# SPDX-License-Identifier: Apache-2.0
"""Histories in which a promise is broken, and what may be done to one record of a history: all that a test by chance
draws from."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from chaos.history.file import read
from chaos.history.records import (
    Asked,
    Counted,
    Done,
    Exited,
    Fault,
    Filled,
    Firmware,
    Header,
    Held,
    History,
    Observation,
    Record,
)
from tests.unit.core.build import ALL, Builder, changed, moved
from tests.unit.core.doctored import KILL_DESTINATION, MOVE, Change, answered, charge, failed, replaced, see
from tests.unit.core.test_narrow_findings import moved_es
from tests.unit.core.test_p02_one_charge import mirrored, moved_mirror
from tests.unit.core.test_p06_clean_failure import usable
from tests.unit.core.test_p07_errors import refused
from tests.unit.core.test_p08_no_deadlock import hung, outlived
from tests.unit.core.test_p10_limits import limited
from tests.unit.core.test_p11_charges_stay import went
from tests.unit.core.test_p13_no_firmware_traffic import watched
from tests.unit.core.test_p14_within_bounds import written_behind, written_beyond

STORED = Path(__file__).parents[1] / "data" / "runs-6f20727"
ERRNOS = (errno.EBUSY, errno.EIO, errno.EBADF, errno.EINVAL, errno.ENOTTY)


def _of(name: str, *changes: Change) -> Callable[[], History]:
    def make() -> History:
        history = ALL[name]()
        for change in changes:
            history = changed(history, change)
        return history

    return make


def _killed(change: Change) -> Callable[[], History]:
    return _of(KILL_DESTINATION, change)


def _stored(name: str) -> History:
    (path,) = STORED.glob(f"{name}/*/history.jsonl")
    return read(path)


def _refused_again() -> History:
    b = usable()
    see(b, "limits", {"source": 1})
    b.do("move", "destination", error=errno.EBUSY, vm="new", source="old")
    return b.finish()


def _warned() -> History:
    b = Builder()
    b.begin()
    b.kernel("WARNING: CPU: 1 PID: 402 at kernel/cgroup/misc.c:98 misc_cg_cancel_charge+0x58/0x60")
    return b.finish()


def _end(**values: object) -> Callable[[], History]:
    return _of(MOVE, replaced(Observation, {"label": "end"}, **values))


BROKEN: dict[str, tuple[str, str, Callable[[], History]]] = {
    "p1-overcharged": ("P1", MOVE, _of(MOVE, charge("after", "source", 1), charge("after", ".", 2))),
    "p1-es-by-the-wrong-key": ("P1", "", moved_es),
    "p2-mirror-pays": ("P2", "", lambda: mirrored(charged=1).finish()),
    "p2-moved-mirror-pays": ("P2", "", lambda: moved_mirror(charged=1).finish()),
    "p3-source-answers": ("P3", MOVE, lambda: moved(ask_dead=False)),
    "p4-none-owns": ("P4", MOVE, _of(MOVE, answered("guest_status", "new", outcome="fail", errno=errno.ENOTTY))),
    "p4-firmware-counts": ("P4", MOVE, _of(MOVE, replaced(Observation, {"label": "after"}, guests=2))),
    "p5-ebadf": ("P5", MOVE, lambda: moved(status_error=errno.EBADF)),
    "p5-stopped": ("P5", MOVE, _of(MOVE, replaced(Counted, {"vm": "new"}, ticks=99))),
    "p5-stopped-after-failure": ("P5", KILL_DESTINATION, _killed(replaced(Counted, {"ticks": 900}, ticks=1))),
    "p6-refused-again": ("P6", "", _refused_again),
    "p6-status": ("P6", "", lambda: failed(status_error=errno.EBADF).finish()),
    "p6-guests": ("P6", KILL_DESTINATION, _killed(replaced(Observation, {"label": "after"}, guests=2))),
    "p7-another-errno": ("P7", "", lambda: refused(error=errno.EBUSY)),
    "p8-never-ends": ("P8", "", hung),
    "p8-outlives-its-signal": ("P8", "", lambda: outlived(release=29.9).end()),
    "p9-charge-left": ("P9", MOVE, _of(MOVE, charge("end", ".", 1))),
    "p9-guest-left": ("P9", MOVE, _end(guests=1)),
    "p9-vm-left": ("P9", MOVE, _end(vms={"101-9": 2})),
    "p9-asid-left": ("P9", MOVE, _of(MOVE, replaced(Filled, {"label": "end"}, count={"sev": 7, "sev_es": 7}))),
    "p10-no-event": ("P10", "", lambda: limited(counted=0)),
    "p10-over-the-limit": ("P10", "", lambda: limited(error=0, counted=0, above=0)),
    "p11-followed": ("P11", "", lambda: went({"source": 0, "elsewhere": 1})),
    "p12-warning": ("P12", "", _warned),
    "p13-sent-in-move": ("P13", "", lambda: watched(in_move="DEACTIVATE")),
    "p13-twice": ("P13", "", lambda: watched(twice=True)),
    "p13-never": ("P13", "", lambda: watched(ends=False)),
    "p14-behind": ("P14", "", written_behind),
    "p14-beyond": ("P14", "", written_beyond),
    "stored-move": ("P5", MOVE, lambda: _stored(MOVE)),
    "stored-kill": ("P1", KILL_DESTINATION, lambda: changed(_stored(KILL_DESTINATION), charge("after", "source", 2))),
}


def _done(record: Done, by: int) -> Iterator[Record]:
    change = msgspec.structs.replace
    codes = {*ERRNOS, 1 + abs(by) % 133} - {record.errno}
    yield from (change(record, outcome="fail", errno=code, value={}) for code in sorted(codes))
    yield change(record, outcome="ok", errno=0, firmware=0)
    yield change(record, outcome="info", errno=0, firmware=0, value={}, began=0, ended=0)


def _observation(record: Observation, by: int) -> Iterator[Record]:
    change = msgspec.structs.replace
    for cgroup, files in record.misc.items():
        counts = {key: value + by for key, value in files.get("current", {}).items()}
        yield change(record, misc={**record.misc, cgroup: {**files, "current": counts}})
    if record.guests is not None:
        yield change(record, guests=record.guests + by)
    yield change(record, dying=record.dying + by)
    yield from (change(record, label=label) for label in ("start", "end", "before") if label != record.label)


def _counted(record: Counted, by: int) -> Iterator[Record]:
    yield msgspec.structs.replace(record, ticks=max(0, record.ticks + by))
    yield msgspec.structs.replace(record, stale=abs(by))


def _asked(record: Asked, by: int) -> Iterator[Record]:
    change = msgspec.structs.replace
    for code in (0, errno.EIO, 1 + abs(by) % 133):
        yield change(record, answers=tuple(change(answer, errno=code) for answer in record.answers))
        yield change(record, answers=tuple(change(answer, control=code) for answer in record.answers))


def _filled(record: Filled, by: int) -> Iterator[Record]:
    yield msgspec.structs.replace(record, count={key: max(0, count + by) for key, count in record.count.items()})
    yield msgspec.structs.replace(record, errno={key: 1 + abs(by) % 133 for key in record.errno})
    yield msgspec.structs.replace(record, label="end" if record.label == "start" else "start")


def _firmware(record: Firmware, by: int) -> Iterator[Record]:
    yield msgspec.structs.replace(record, status=record.status + by)
    yield msgspec.structs.replace(record, order=record.order + by)
    yield msgspec.structs.replace(record, handle=by)


def altered(record: Record, by: int) -> list[Record]:
    """The record with another errno, outcome, count (by so much) or label; none if it has nothing of this kind."""
    match record:
        case Done():
            ways = _done(record, by)
        case Observation():
            ways = _observation(record, by)
        case Counted():
            ways = _counted(record, by)
        case Asked():
            ways = _asked(record, by)
        case Filled():
            ways = _filled(record, by)
        case Firmware():
            ways = _firmware(record, by)
        case _:
            ways = _others(record, by)
    return [other for other in ways if other != record]


def _others(record: Record, by: int) -> Iterator[Record]:
    match record:
        case Exited():
            yield msgspec.structs.replace(record, status=by)
        case Fault():
            yield msgspec.structs.replace(record, struck=not record.struck)
        case Held():
            yield msgspec.structs.replace(record, reached=not record.reached)
        case Header():
            yield msgspec.structs.replace(
                record, asids={key: max(0, count + by) for key, count in record.asids.items()}
            )
            yield msgspec.structs.replace(record, log_ahead=None)
