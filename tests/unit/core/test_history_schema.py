# SPDX-License-Identifier: Apache-2.0
"""The format as it is written down: the JSON Schema that comes with the package, and docs/history.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.history import records, schema
from chaos.history.file import up_to_damage
from chaos.history.records import FORMAT, Record, decode, encode
from tests.unit.core.build import ALL

SCHEMA: dict[str, Any] = json.loads(schema.shipped())
PAGE = (Path(__file__).parents[3] / "docs" / "history.md").read_text(encoding="utf-8")
TYPES: tuple[type[msgspec.Struct], ...] = get_args(Record)
KINDS: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "null": type(None)
}  # fmt: skip


def test_the_schema_is_what_the_types_say() -> None:
    assert schema.shipped() == schema.text(), "the types changed: python -m chaos.history.schema"


# -- a validator for what is used of JSON Schema 2020-12 ------------------------------------------------------


def valid(value: Any, schema: dict[str, Any]) -> bool:  # noqa: PLR0912 - a table
    for keyword, argument in schema.items():
        match keyword:
            case "title" | "description" | "default" | "discriminator" | "$schema" | "$defs":
                continue  # they say, and do not demand
            case "$ref":
                ok = valid(value, SCHEMA["$defs"][argument.removeprefix("#/$defs/")])
            case "anyOf":
                ok = any(valid(value, choice) for choice in argument)
            case "type":
                # 1.0 is an integer to JSON Schema and not to us; docs/history.md says so.
                ok = isinstance(value, KINDS[argument]) and (argument != "integer" or not isinstance(value, bool))
            case "enum":
                ok = value in argument
            case "minimum":
                ok = value >= argument
            case "maximum":
                ok = value <= argument
            case "required":
                ok = set(argument) <= set(value)
            case "properties":
                ok = all(valid(value[name], inner) for name, inner in argument.items() if name in value)
            case "additionalProperties":
                ok = all(valid(inner, argument) for inner in value.values())
            case "items":
                ok = all(valid(inner, argument) for inner in value)
            case _:
                raise AssertionError(f"this validator does not know {keyword}")
        if not ok:
            return False
    return True


def decodes(document: Any) -> bool:
    try:
        decode(json.dumps(document).encode())
    except msgspec.DecodeError:
        return False
    return True


@pytest.mark.parametrize("name", ALL)
def test_records_are_valid(name: str) -> None:
    for record in ALL[name]().records:
        assert valid(json.loads(encode(record)), SCHEMA)


def test_every_type_of_record_is_in_the_schema() -> None:
    assert {choice["$ref"] for choice in SCHEMA["anyOf"]} == {f"#/$defs/{record.__name__}" for record in TYPES}
    for record in TYPES:
        definition = SCHEMA["$defs"][record.__name__]
        names = {field.encode_name for field in msgspec.structs.fields(record)}
        assert set(definition["properties"]) == names | {"type"}
        assert "additionalProperties" not in definition  # so that a field can be added


DOCUMENTS = [json.loads(encode(record)) for make in ALL.values() for record in make().records]
VALUES = st.sampled_from([None, True, 0, -1, 1 << 63, 1 << 64, 1.5, "", "ok", "x", [], [1, "a"], [None], {}, {"a": 1}])


@settings(deadline=None)
@given(st.data(), st.sampled_from(DOCUMENTS))
def test_the_schema_and_the_reader_agree(data: st.DataObject, document: dict[str, Any]) -> None:
    changed: dict[str, Any] = json.loads(json.dumps(document))
    at: Any = changed
    while True:
        key = data.draw(st.sampled_from(sorted(at))) if isinstance(at, dict) else 0
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    match data.draw(st.sampled_from(["drop", "add", "change"])):
        case "drop":
            del at[key]
        case "add" if isinstance(at, dict):
            at["extra"] = data.draw(VALUES)
        case _:
            at[key] = data.draw(VALUES)
    assert valid(changed, SCHEMA) == decodes(changed)


# -- the page -------------------------------------------------------------------------------------------------


def section(title: str) -> str:
    found = re.search(rf"^### {title}\n(.*?)(?=^#)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/history.md has no section on {title}"
    return found[1]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


@pytest.mark.parametrize("record", TYPES, ids=lambda record: record.__name__)
def test_every_field_is_on_the_page(record: type[msgspec.Struct]) -> None:
    rows = [row.split("|")[1:-1] for row in section(record.__name__).splitlines() if row.startswith("| `")]
    told = {name: kind.strip() for names, kind, _ in rows for name in names_in(names)}
    fields = {f.encode_name: f for f in msgspec.structs.fields(record) if f.encode_name not in ("seq", "t")}
    assert list(told) == list(fields)
    for name, field in fields.items():
        if field.required:
            assert "(" not in told[name], f"{name} has no default"
        else:
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            assert told[name].endswith(f"({json.dumps(default)})"), f"{name} has a default of {json.dumps(default)}"


def test_every_operation_is_on_the_page() -> None:
    doc = records.__doc__ or ""
    listed = dict(re.findall(r"(?:^    |, )(\w+) \{([^}]*)\}", doc.split("arrow,")[1], re.MULTILINE))
    part = PAGE[PAGE.index("## An operation") : PAGE.index("## Records")]
    rows = [row.split("|") for row in part.splitlines() if row.startswith("| `")]
    told = {f: names_in(row[2]) for row in rows for f in names_in(row[1]) if f in listed}
    assert told == {f: re.findall(r"\w+", arguments) for f, arguments in listed.items()}


def test_the_format_on_the_page_and_its_examples() -> None:
    assert f"This is **format {FORMAT}**." in PAGE
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    lines = example.splitlines()
    assert all(valid(json.loads(line), SCHEMA) for line in lines)
    assert up_to_damage([decode(line.encode()) for line in lines]).damage == ""
