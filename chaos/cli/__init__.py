# SPDX-License-Identifier: Apache-2.0
"""The command line, one file a verb. A verb's file is imported only when it is called for."""

from __future__ import annotations

import importlib
import sys

import click

from chaos.errors import ExitCode, SevchaosError

# verb → (module, one line of help); the module has a click command of the same name.
VERBS = {
    "run": "run experiments and judge them",
    "plan": "print what a run would do, without doing it",
    "list": "name the experiments there are, or the faults",
    "findings": "which promises stock kernels break, and whether a kernel does",
    "explain": "say what a fault does, where it may strike, what it needs and what proves it",
    "validate": "check experiment files",
    "new": "write an experiment to start from",
    "check": "judge a stored run again",
    "doctor": "say what this machine can do, what it lacks, and what to do about it",
    "lab": "a SEV host without SEV hardware: run programs in it, manage what it keeps",
    "kernel": "kernels for the lab: which there are; fetch, build and remove them",
    "clean": "remove what a dead run left on this host",
}


class Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = getattr(importlib.import_module(f"chaos.cli.{cmd_name}_verb"), cmd_name + "_")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sevchaos", message="sevchaos %(version)s")
def cli() -> None:
    """Break the migration of confidential VMs on purpose, and see whether the kernel kept its promises.

    Exit codes: 0 nothing counts against the kernel and something is kept, 1 broken, 2 unknown or nothing kept,
    3 could not clean up, 4 everything skipped, 64 usage, 69 this host lacks something, 70 internal error,
    73 no space, 80 the lab's kernel panicked, 81 hung, 82 QEMU died, 83 the software PSP died, 130 interrupted.
    """


def main() -> None:
    """Entry point of the `sevchaos` command."""
    try:
        code = cli.main(prog_name="sevchaos", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except SevchaosError as error:
        from chaos.cli.common import explain

        explain(error)
        sys.exit(error.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("sevchaos: interrupted", err=True)
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception:
        import traceback

        traceback.print_exc()
        click.echo("sevchaos: internal error; please report the lines above", err=True)
        sys.exit(ExitCode.INTERNAL)
