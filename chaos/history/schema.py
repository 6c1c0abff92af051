# SPDX-License-Identifier: Apache-2.0
"""The format of a history as JSON Schema, made from the types of `chaos.history.records`. `python -m
chaos.history.schema` writes `history.schema.json` anew, which is what has to be done when those types change.

The schema is for one line. What a history is as a whole stands in docs/history.md and in `chaos.history.records`: that
records are numbered without holes, that the first is a header, and so on.
"""

from __future__ import annotations

import inspect
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from chaos.history.records import FORMAT, Record

NAME = "history.schema.json"


def generate() -> dict[str, Any]:
    """The schema that the types say, in JSON Schema 2020-12."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A record of a sevchaos history, format {FORMAT}",
        "description": "One line of history.jsonl. Fields that are not listed are to be ignored, fields with a default "
        "may be missing; see docs/history.md.",
        **msgspec.json.schema(Record),
    }
    for definition in schema["$defs"].values():
        if "description" in definition:
            definition["description"] = " ".join(inspect.cleandoc(definition["description"]).split())
    return schema


def text() -> str:
    return json.dumps(generate(), indent=2, ensure_ascii=False) + "\n"


def shipped() -> str:
    """The schema as it comes with the package."""
    return files("chaos.history").joinpath(NAME).read_text(encoding="utf-8")


if __name__ == "__main__":
    Path(__file__).with_name(NAME).write_text(text(), encoding="utf-8")
