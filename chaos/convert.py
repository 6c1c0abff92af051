# SPDX-License-Identifier: Apache-2.0
"""Plain data as a value of a type, or else which key is wrong, what it says, and what is allowed there.

msgspec finds out whether; it names neither the key in a map, nor what would do. Both are looked up here: the key by
asking again with one key at a time, what would do in the type itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

T = TypeVar("T")
KeyPath = tuple[str | int, ...]


class NotConvertible(Exception):
    """`key` is where, as script[2].vm, "" for all of it; `problem` what is wrong there, `allowed` what would not be."""

    def __init__(self, key: str, problem: str, allowed: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key, self.problem, self.allowed = key, problem, allowed


def convert(data: Any, kind: type[T]) -> T:
    """Raises `NotConvertible`."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ValueError):  # a structure's own check, which says it all
            raise NotConvertible("", str(error.__cause__), "") from error
        raise _explained(data, kind, str(error)) from error


def _explained(data: Any, kind: type, said: str) -> NotConvertible:
    problem, _, where = said.partition(" - at `")
    inside = where.startswith("key` in `$")  # it is the key itself that is wrong
    place = _place(data, kind, said, where.removeprefix("key` in `").strip("`"), key=inside)
    if inside:
        *place_of_map, key = place
        found = _type_at(data, kind, tuple(place_of_map))
        allowed = _described(_bare(found.key_type)) if isinstance(found, inspect.DictType) else ""
        return NotConvertible(_written(place), f"{key!r:.80} cannot be a key here: {_plain(problem)}", allowed)
    found, value = _type_at(data, kind, place), _value_at(data, place)
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", problem, re.DOTALL)
    missing = re.fullmatch(r"Object missing required field `(.*)`", problem)
    if unknown:
        return NotConvertible(
            _written((*place, unknown[1])), "there is no such key here", _described(_chosen(found, value))
        )
    if missing:
        below = _field(found, missing[1], value)
        if below is None:  # of steps and the like that which says what they are
            return NotConvertible(_written((*place, missing[1])), "it is missing", _described(found))
        return NotConvertible(_written((*place, missing[1])), "it is missing", _described(below))
    shown = "" if value is None or isinstance(value, list | dict) else f" (it is {str(value)[:80]!r})"
    return NotConvertible(_written(place), f"{_plain(problem)}{shown}", _described(found))


# -- where ------------------------------------------------------------------------------------------------


def _place(data: Any, kind: type, said: str, where: str, *, key: bool) -> KeyPath:
    """The place that msgspec names, with what it leaves out: the keys of maps."""
    place: KeyPath = ()
    parts = [name or number for name, number in re.findall(r"\.([^.\[\]]+)|\[([^\]]*)\]", where)]
    for part in (*parts, *(["..."] if key else [])):
        if part == "...":
            place = (*place, _key_at(data, kind, said, place))
        else:
            place = (*place, int(part) if part.isdigit() else part)
    return place


def _key_at(data: Any, kind: type, said: str, place: KeyPath) -> str:
    """Which key of the map at `place` it is: that which is as wrong alone."""
    whole = _value_at(data, place)
    for key in whole:
        try:
            msgspec.convert(_with(data, place, {key: whole[key]}), kind)
        except msgspec.ValidationError as error:
            if str(error) == said:
                return str(key)
    return "..."


def _with(data: Any, place: KeyPath, value: Any) -> Any:
    """The data with another value at that place."""
    if not place:
        return value
    first, *rest = place
    copy = data.copy()
    copy[first] = _with(data[first], tuple(rest), value)
    return copy


def _value_at(data: Any, place: KeyPath) -> Any:
    for part in place:
        data = data[part]
    return data


def _written(place: KeyPath) -> str:
    """As a user would look for it; odd characters are escaped."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part:.60}" for part in place).removeprefix(".")
    return text.encode("unicode_escape").decode()


_WORDS = {"`object`": "a map", "`array`": "a list", "`str`": "text", "`int`": "a whole number", "`float`": "a number",
          "`bool`": "true or false", "`null`": "nothing", "`bytes`": "binary data"}  # fmt: skip


def _plain(problem: str) -> str:
    """What msgspec says, without the words of its trade."""
    if re.match("Invalid (enum )?value", problem):
        return "there is no such choice"
    problem = re.sub(r" matching regex .*", " of another form", problem)
    for word, plain in _WORDS.items():
        problem = problem.replace(word, plain)
    return problem[:1].lower() + problem[1:]


# -- what is allowed --------------------------------------------------------------------------------------


def _type_at(data: Any, kind: type, place: KeyPath) -> inspect.Type:
    found = _bare(inspect.type_info(kind))
    for part in place:
        found, data = _below(found, part, data), data[part]
    return found


def _below(found: inspect.Type, part: str | int, data: Any) -> inspect.Type:
    match found:
        case inspect.DictType():
            return _bare(found.value_type)
        case inspect.VarTupleType() | inspect.ListType():
            return _bare(found.item_type)
    return _field(found, str(part), data) or inspect.AnyType()


def _field(found: inspect.Type, name: str, data: Any) -> inspect.Type | None:
    """The type of a field of a structure; of that which says what the structure is, one of what there are."""
    structures = tuple(_structures(found))
    if any(isinstance(each, inspect.StructType) and each.tag_field == name for each in structures):
        return inspect.LiteralType(_tags(found))
    chosen = _chosen(found, data)
    if not isinstance(chosen, inspect.StructType | inspect.DataclassType):
        return None
    return next((_bare(field.type) for field in chosen.fields if field.encode_name == name), None)


def _chosen(found: inspect.Type, data: Any) -> inspect.Type:
    """Of several kinds of structures the one that `data` says it is, if it does."""
    for each in _structures(found):
        if not isinstance(each, inspect.StructType) or each.tag_field is None or data.get(each.tag_field) == each.tag:
            return each
    return found


def _structures(found: inspect.Type) -> Iterator[inspect.StructType | inspect.DataclassType]:
    for each in found.types if isinstance(found, inspect.UnionType) else (found,):
        if isinstance(each, inspect.StructType | inspect.DataclassType):
            yield each


def _tags(found: inspect.Type) -> tuple[str, ...]:
    return tuple(sorted(str(each.tag) for each in _structures(found) if isinstance(each, inspect.StructType)))


def _bare(found: inspect.Type) -> inspect.Type:
    """Without what was said of it in words, but for patterns: those words are all there is to show of them."""
    if isinstance(found, inspect.Metadata):
        words = (found.extra_json_schema or {}).get("description")
        if words and isinstance(found.type, inspect.StrType):
            return inspect.StrType(pattern=str(words))
        return _bare(found.type)
    if isinstance(found, inspect.UnionType):  # "or nothing" is left out: it is said by leaving out the key
        kinds = tuple(_bare(each) for each in found.types if not isinstance(each, inspect.NoneType))
        return kinds[0] if len(kinds) == 1 else inspect.UnionType(kinds)
    return found


def _described(found: inspect.Type) -> str:  # noqa: PLR0911 - a table
    """What is allowed, in words."""
    match found:
        case inspect.LiteralType():
            return f"one of {', '.join(map(str, found.values))}"
        case inspect.EnumType():
            return f"one of {', '.join(str(each.value) for each in found.cls)}"
        case inspect.IntType() | inspect.FloatType():
            name = "a whole number" if isinstance(found, inspect.IntType) else "a number"
            return f"{name}{_bounds(found)}"
        case inspect.StrType():
            return f"text: {found.pattern}" if found.pattern else "text"
        case inspect.BoolType():
            return "true or false"
        case inspect.StructType() | inspect.DataclassType():
            return f"a map with the keys {', '.join(map(_keyed, found.fields))}"
        case inspect.UnionType() if any(_structures(found)):
            return f"a map whose key `do` is one of {', '.join(_tags(found))}"
        case inspect.UnionType():
            return " or ".join(_described(each) for each in found.types)
        case inspect.DictType():
            return f"a map from {_described(_bare(found.key_type))} to {_described(_bare(found.value_type))}"
        case inspect.VarTupleType() | inspect.ListType():
            return f"a list in which each is {_described(_bare(found.item_type))}"
    return ""


def _keyed(field: inspect.Field) -> str:
    return field.encode_name if field.required else f"({field.encode_name})"


def _bounds(number: inspect.IntType | inspect.FloatType) -> str:
    named = (("more than", number.gt), ("at least", number.ge), ("less than", number.lt), ("at most", number.le))
    said = " and ".join(f"{words} {bound}" for words, bound in named if bound is not None)
    return f", {said}" if said else ""
