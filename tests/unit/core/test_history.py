# SPDX-License-Identifier: Apache-2.0
"""Histories written, read, and damaged."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.history import FORMAT, End, Header, History, Kernel, Writer, damage_of, decode, encode, read
from tests.unit.core.build import ALL, moved


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
    assert damage_of(whole) == ""
    assert damage_of(()) == "it is empty"
    assert damage_of(whole[1:]) == "it does not begin with a header"
    assert damage_of(whole[:-1]) == f"it breaks off after record {len(whole) - 2}"
    assert damage_of((*whole[:4], *whole[5:])) == "record 4 is missing: 5 stands in its place"
    newer = msgspec.structs.replace(header, format=FORMAT + 1)
    assert damage_of((newer, *whole[1:])) == f"it has format {FORMAT + 1}, this program reads {FORMAT}"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2000))
def test_a_history_cut_anywhere_says_so(length: int) -> None:
    data = b"".join(encode(record) for record in moved().records)
    kept = data[: length * len(data) // 2001]
    records = []
    for line in kept.splitlines(keepends=True):
        try:
            records.append(decode(line))
        except msgspec.DecodeError:
            break
    assert damage_of(records) != ""


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
