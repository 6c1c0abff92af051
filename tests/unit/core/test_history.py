# SPDX-License-Identifier: Apache-2.0
"""Histories written, read, and damaged."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaos.controller.directory import RunDirectory
from chaos.controller.host_description import HostDescription
from chaos.errors import UsageError
from chaos.history.file import Writer, read, up_to_damage
from chaos.history.records import FORMAT, Done, End, Header, History, Invoke, Kernel, Observation, Record, encode
from chaos.judge.judge import judge
from chaos.judge.verdict import Outcome
from reports import as_json, junit, ktap, text
from reports.run import Run
from tests.unit.core.build import ALL, moved, shipped
from tests.unit.mutation import mutated


@pytest.mark.parametrize("name", ALL)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "history.jsonl")
    for record in ALL[name]().records:
        writer.write(record)
    writer.close()
    assert read(tmp_path / "history.jsonl") == writer.history() == ALL[name]()


def test_the_writer_numbers_the_records(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "history.jsonl")
    numbered = [writer.write(Kernel(seq=99, t=t, level=6, text="x")) for t in range(3)]
    writer.close()
    assert [record.seq for record in numbered] == [0, 1, 2]


def test_a_history_is_never_written_over(tmp_path: Path) -> None:
    Writer(tmp_path / "history.jsonl").close()
    with pytest.raises(FileExistsError):
        Writer(tmp_path / "history.jsonl")


def test_a_line_that_is_no_record(tmp_path: Path) -> None:
    whole = moved().records
    path = tmp_path / "history.jsonl"
    path.write_bytes(encode(whole[0]) + encode(whole[1]) + b'{"type":"Invoke"')
    history = read(path)
    assert history.records == whole[:2]
    assert history.damage.startswith("line 3 is damaged: ")


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "history.jsonl")


def test_damage() -> None:
    whole = moved().records
    header = whole[0]
    assert isinstance(header, Header)
    assert up_to_damage(whole).damage == ""
    assert up_to_damage(()).damage == "it is empty"
    assert up_to_damage(whole[1:]).damage == "it does not begin with a header"
    assert up_to_damage(whole[:-1]).damage == f"it breaks off after record {len(whole) - 2}"
    assert up_to_damage((*whole[:4], *whole[5:])).damage == "record 4 is missing: 5 stands in its place"
    newer = msgspec.structs.replace(header, format=FORMAT + 1)
    assert up_to_damage((newer, *whole[1:])).damage == f"it has format {FORMAT + 1}, this program reads {FORMAT}"


@pytest.mark.parametrize(
    ("change", "damage", "kept"),
    [
        (lambda r: (*r[:4], *r[5:]), "record 4 is missing: 5 stands in its place", 4),
        (lambda r: (*r, r[-1]), f"record {len(moved().records)} is missing: ", None),
        (lambda r: (*r, numbered(Kernel(t=1, level=6, text="x"), len(r))), "comes after the end", None),
        (lambda r: (*r[:9], numbered(r[0], 9), *r[10:]), "record 9 is another header", 9),
        (lambda r: again(r, Invoke), "begins operation 1 a second time", None),
        (lambda r: again(r, Done), "answers operation 1, which is not under way", None),
        (lambda r: counting(r, 1 << 64), "has a number that no counter shows", None),
        (lambda r: counting(r, (1 << 64) - 1), "", None),  # one below zero, as the kernel prints it
    ],
)
def test_what_comes_after_damage_is_left_out(
    change: Callable[[tuple[Record, ...]], tuple[Record, ...]], damage: str, kept: int | None
) -> None:
    records = change(moved().records)
    history = up_to_damage(records)
    assert damage in history.damage
    assert bool(history.damage) == bool(damage)
    assert history.records == records[: len(history.records)]
    if kept is not None:
        assert len(history.records) == kept


def numbered(record: Record, seq: int) -> Record:
    replaced: Record = msgspec.structs.replace(record, seq=seq)
    return replaced


def again(records: tuple[Record, ...], kind: type[Record]) -> tuple[Record, ...]:
    """With the first record of that kind a second time, just before the end."""
    first = next(record for record in records if isinstance(record, kind))
    *before, end = records
    return (*before, numbered(first, len(before)), numbered(end, len(before) + 1))


def counting(records: tuple[Record, ...], number: int) -> tuple[Record, ...]:
    return tuple(
        msgspec.structs.replace(record, misc={".": {"current": {"sev": number}}})
        if isinstance(record, Observation)
        else record
        for record in records
    )


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"End","seq":1,"t":1,"complete":true,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"type":"Kernel","seq":1,"t":1,"level":1,"text":"\xff"}',
        b'{"type":"Kernel","seq":1,"t":1,"level":1,"text":"\\ud800"}',
        b'{"type":"End","seq":1,"t":' + b"9" * 5000 + b',"complete":true}',
        b'{"type":"End","seq":1,"t":9223372036854775808,"complete":true}',
        b'{"type":"End","seq":1,"t":1.0,"complete":true}',
        b'{"type":"Nothing","seq":1,"t":1}',
        b"",
        b"\x00" * 100,
    ],
)
def test_lines_that_are_no_records(line: bytes, tmp_path: Path) -> None:
    whole = moved().records
    path = tmp_path / "history.jsonl"
    path.write_bytes(encode(whole[0]) + line + b"\n" + encode(whole[1]))
    history = read(path)
    assert history.records == whole[:1]
    assert history.damage.startswith("line 2 is damaged: ")


@pytest.mark.parametrize("rest", [b"", b',"new":[1]', b',"asids":"another type"'])
def test_another_format_is_named_however_it_differs(rest: bytes, tmp_path: Path) -> None:
    header = encode(msgspec.structs.replace(moved().records[0], format=FORMAT + 1))
    header = header.replace(b"}}\n", b"}" + rest + b"}\n")
    path = tmp_path / "history.jsonl"
    path.write_bytes(header + b'{"type":"New"}\n')
    assert read(path).damage == f"it has format {FORMAT + 1}, this program reads {FORMAT}"


def test_a_gap_before_a_line_that_is_no_record_is_what_is_told(tmp_path: Path) -> None:
    whole = moved().records
    path = tmp_path / "history.jsonl"
    path.write_bytes(encode(whole[0]) + encode(whole[2]) + b"nothing\n")
    assert read(path) == History(whole[:1], "record 1 is missing: 2 stands in its place")


def test_a_writer_that_may_write_a_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:7]))
    writer = Writer(tmp_path / "history.jsonl")
    for record in moved().records:
        writer.write(record)
    writer.close()
    assert read(tmp_path / "history.jsonl") == moved()


# -- damaged at random ----------------------------------------------------------------------------------------

WHOLE = {name: b"".join(encode(record) for record in make().records) for name, make in ALL.items()}
MAY_CUT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def judged_and_reported(name: str, history: History) -> dict[str, Outcome]:
    """Nothing of this may fail, whatever the history is."""
    verdict = judge(shipped(name), history)
    run = Run(shipped(name), history, verdict, Path("runs"))
    for report in (text.render([run]), as_json.render([run]), junit.render([run]), ktap.render([run])):
        assert report
    return {judged.promise: judged.outcome for judged in verdict.verdicts}


@MAY_CUT
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1, exclude_max=True))
def test_a_history_cut_anywhere_accuses_and_clears_nobody(tmp_path: Path, name: str, where: float) -> None:
    data = WHOLE[name]
    path = tmp_path / "history.jsonl"
    path.write_bytes(data[: int(where * (len(data) - 1))])  # without the line end it would still be whole
    history = read(path)
    assert history.damage
    assert history.records == ALL[name]().records[: len(history.records)]
    assert set(judged_and_reported(name, history).values()) <= {Outcome.UNKNOWN}


@MAY_CUT
@given(st.data(), st.sampled_from(sorted(WHOLE)))
def test_random_bytes_in_a_history_never_break_anything(tmp_path: Path, data: st.DataObject, name: str) -> None:
    whole = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        length = data.draw(st.integers(0, 30))
        whole[at : at + length] = data.draw(st.binary(max_size=30) | st.sampled_from([b"\n", b"\xff", b"0", b'"']))
    path = tmp_path / "history.jsonl"
    path.write_bytes(whole)
    judged_and_reported(name, read(path))


@MAY_CUT
@given(st.binary(max_size=300))
def test_random_bytes_alone(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(data)
    history = read(path)
    assert history.records == ()
    assert history.damage


def test_a_million_random_bytes_of_histories(tmp_path: Path) -> None:
    """Nonsense, and histories with a few bytes changed, of which some are judged, as far as they can be read."""
    chance = random.Random(4)
    path = tmp_path / "history.jsonl"
    fed = 0
    while fed < 1_000_000:
        name = chance.choice(sorted(WHOLE))
        data = mutated(WHOLE[name], chance) if chance.random() < 0.9 else chance.randbytes(chance.choice([10, 50_000]))
        path.write_bytes(data)
        history = read(path)
        if chance.random() < 0.3:
            judged_and_reported(name, history)
        fed += len(data)


@MAY_CUT
@given(st.data(), st.sampled_from(sorted(WHOLE)))
def test_records_in_disorder_never_break_anything(data: st.DataObject, name: str) -> None:
    records = list(ALL[name]().records)
    for _ in range(data.draw(st.integers(1, 5))):
        here = data.draw(st.integers(0, len(records) - 1))
        there = data.draw(st.integers(0, len(records) - 1))
        match data.draw(st.sampled_from(["drop", "double", "swap"])):
            case "drop" if len(records) > 1:
                del records[here]
            case "double":
                records.insert(here, records[there])
            case _:
                records[here], records[there] = records[there], records[here]
    if data.draw(st.booleans()):
        records = [numbered(record, seq) for seq, record in enumerate(records)]
    judged_and_reported(name, up_to_damage(records))


def test_a_run_directory_with_anything_in_it(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, shipped("move-across-cgroups"), 1, HostDescription(host="lab"))
    directory.history.write_bytes(b"\xff")
    assert directory.read()[1].damage.startswith("line 1 is damaged")
    for data in (b"\xff", b"{", b'{"name": "\xff"}', b"[" * 100_000):
        (directory.path / "experiment.json").write_bytes(data)
        with pytest.raises(UsageError, match="is no run directory"):
            directory.read()


@pytest.mark.parametrize("name", ["experiment.json", "history.jsonl"])
def test_a_pipe_in_a_run_directory_is_not_waited_for(tmp_path: Path, name: str) -> None:
    directory = RunDirectory.create(tmp_path, shipped("move-across-cgroups"), 1, HostDescription(host="lab"))
    directory.history.touch()
    (directory.path / name).unlink()
    os.mkfifo(directory.path / name)
    with pytest.raises(UsageError, match=f"is no run directory: .*{name} is no file"):
        directory.read()


def test_parts_of_a_history() -> None:
    history = moved()
    assert isinstance(history.header, Header)
    assert isinstance(history.end, End)
    invoke, done = next(iter(history.operations()))
    assert (invoke.f, done) == ("spawn", history.done(invoke.op))
    assert history.done(-1) is None
    empty = History(())
    assert (empty.header, empty.end) == (None, None)
    assert History(history.records[1:-1]).header is None
    assert History(history.records[1:-1]).end is None
