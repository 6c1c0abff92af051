# SPDX-License-Identifier: Apache-2.0
"""`sevchaos doctor`: what this machine can do, for both kinds of host."""

from __future__ import annotations

import click

from chaos.controller.doctor import DoctorCheck, DoctorState, examine_lab, examine_local
from chaos.errors import ExitCode

_SIGNS = {DoctorState.GOOD: ("✓", "green"), DoctorState.POOR: ("!", "yellow"), DoctorState.MISSING: ("✗", "red")}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def doctor_(*, as_json: bool) -> int:
    """Say what this machine can do, what it lacks, and what to do about each.

    Exits 0 if at least one of the two hosts can be used, 69 if neither can.
    """
    hosts = {"lab": examine_lab(), "local": examine_local()}
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(hosts))
    else:
        for host, checks in hosts.items():
            _show(host, checks)
    usable = any(all(check.state is not DoctorState.MISSING for check in checks) for checks in hosts.values())
    return ExitCode.KEPT if usable else ExitCode.HOST_LACKS


def _show(host: str, checks: tuple[DoctorCheck, ...]) -> None:
    missing = sum(check.state is DoctorState.MISSING for check in checks)
    verdict = "can be used" if not missing else f"cannot be used: {missing} thing{'s' * (missing > 1)} missing"
    click.echo(click.style(f"--host {host}: {verdict}", bold=True))
    for check in checks:
        sign, colour = _SIGNS[check.state]
        click.echo(f"  {click.style(sign, fg=colour)} {check.what}: {check.seen}")
        if check.remedy:
            click.echo(f"      what to do: {check.remedy}")
