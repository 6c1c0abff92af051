# SPDX-License-Identifier: Apache-2.0
"""`sevchaos explain`: a fault, or an experiment, for whoever has not met it."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import click

import experiments
from chaos import fault
from chaos.errors import UsageError
from chaos.experiment import load

_TARGETS = {
    "vmm": "a VMM",
    "vm": "a VM",
    "cgroup": "a cgroup",
    "link": "the links of a VMM",
    "host": "the host",
    "caller": "a VMM, or whoever calls",
}
_MUST_BE_GIVEN = "must be given"
_WIDTH = 96


@click.command("explain")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def explain_(*, name: str, as_json: bool) -> None:
    """Say what a fault does, where it may strike, what it needs and what proves it; of an experiment, its why."""
    if name in fault.names():
        told = describe(name)
        if as_json:
            import msgspec

            click.echo(msgspec.json.encode(told))
            return
        click.echo("\n".join(_lines(told)))
        return
    if name not in experiments.catalogue():
        raise UsageError(
            f"there is neither a fault nor an experiment {name!r}", remedy="`sevchaos list` and `sevchaos list faults`"
        )
    from chaos.cli.plan_verb import show

    show(load.load(experiments.catalogue()[name]), as_json=as_json)


def describe(name: str) -> dict[str, Any]:
    """What there is to know of the fault of this name. Raises `UsageError`."""
    kind = fault.load(name)
    return {
        "name": name,
        "does": inspect.cleandoc(kind.__doc__ or ""),
        "target": kind.TARGET,
        "options": list(_options(kind)),
        "where": kind.WHERE,
        "needs": kind.NEEDS,
        "proof": kind.PROOF,
        "disturbs": kind.DISTURBS,
    }


def _options(kind: type[fault.Fault]) -> Iterator[dict[str, str]]:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if not field.init:
            continue
        choices = get_args(hints[field.name])
        allowed = ", ".join(getattr(choice, "__name__", str(choice)) for choice in choices or (hints[field.name],))
        default = _MUST_BE_GIVEN if field.default is dataclasses.MISSING else repr(field.default)
        yield {"name": field.name, "allowed": allowed, "default": default}


def _lines(told: dict[str, Any]) -> Iterator[str]:
    yield f"{click.style(told['name'], bold=True)}  (strikes {_TARGETS[told['target']]})"
    for paragraph in told["does"].split("\n\n"):
        yield textwrap.fill(" ".join(paragraph.split()), width=_WIDTH, initial_indent="  ", subsequent_indent="  ")
    for title in ("where", "needs", "proof"):
        yield textwrap.fill(told[title], width=_WIDTH, initial_indent=f"  {title + ':':<8}", subsequent_indent=" " * 10)
    if told["disturbs"]:
        yield "  while it is applied nothing is asked but by steps (docs/experiments.md)"
    for option in told["options"]:
        default = option["default"] if option["default"] == _MUST_BE_GIVEN else f"default: {option['default']}"
        yield f"  option {option['name']}: {option['allowed']} ({default})"
    named = "a VMM" if told["target"] in ("caller", "link") else _TARGETS[told["target"]]
    target = "" if told["target"] == "host" else f", target: NAME OF {named.upper()}"
    yield f"  in a script: - {{do: fault, fault: {told['name']}{target}, options: {{…}}}}"
