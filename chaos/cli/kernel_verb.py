# SPDX-License-Identifier: Apache-2.0
"""`sevchaos kernel`: the kernels that a lab can run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chaos.cli.common import say, tell_removed
from chaos.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos.judge.findings import Finding
    from chaos.lab.kernel.offers import KernelOffer


@click.group()
def kernel_() -> None:
    """Kernels for the lab: Debian's, of every suite of its archive, whatever this machine runs.

    They are fetched by apt, verified against Debian's keyring, unpacked into the cache and never installed. Nothing
    needs root, and of the machine's own packages and lists nothing is touched.
    """


@kernel_.command("list")
@click.option("--all", "every", is_flag=True, help="Every kernel of each series, not the newest alone.")
@click.option("--refresh", is_flag=True, help="Fetch the lists of the archive first.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def list_(*, every: bool, refresh: bool, as_json: bool) -> None:
    """Which there are, which of them are here, and which findings were seen on exactly that version.

    What a series such as debian:6.12 means is the newest of it in the lists, which change with --refresh alone; on
    Debian 12 and 13 it is the newest that was built for that Debian, if there is one.
    """
    from chaos.cache.entries import megabytes
    from chaos.judge import findings
    from chaos.lab.kernel import archive, offers

    found = offers.offers(say=say, refresh=refresh)
    shown = found if every else offers.newest(found)
    known = findings.load()
    if as_json:
        import msgspec

        rows = [
            {
                "kernel": o.source,
                "version": o.version,
                "bytes": o.here,
                "gone": o.gone,
                "built": o.built,
                "findings": _seen(o, known),
            }
            for o in shown
        ]
        click.echo(msgspec.json.encode(rows))
        return
    _table(shown, known)
    if missing := archive.lacking():
        click.echo(f"there is no list of {', '.join(missing)}, so none of their kernels: --refresh", err=True)
    if not every:
        click.echo(f"{len(found) - len(shown)} older ones can be had too: --all", err=True)
    click.echo(f"{megabytes(sum(e.size for e in offers.beside()))} beside them: `sevchaos kernel clean`", err=True)


def _seen(offer: KernelOffer, known: Sequence[Finding]) -> list[str]:
    """Of one that was built here nobody says so: it may be without them."""
    if offer.built:
        return []
    return [f.id for f in known if offer.series in f.kernels and offer.version in f.kernels[offer.series].seen]


def _table(shown: Sequence[KernelOffer], known: Sequence[Finding]) -> None:
    from chaos.cache.entries import megabytes

    click.echo(f"{'kernel':<34} {'version':<10} {'here':>8}  findings seen on it")
    for offer in shown:
        here = "" if offer.here is None else megabytes(offer.here)
        gone = "  (no longer in the archive)" if offer.gone else "  (built here)" if offer.built else ""
        click.echo(f"{offer.source:<34} {offer.version:<10} {here:>8}  {' '.join(_seen(offer, known))}{gone}".rstrip())


@kernel_.command("fetch")
@click.argument("sources", nargs=-1, required=True, metavar="KERNEL…")
def fetch(sources: tuple[str, ...]) -> None:
    """Fetch kernels, and build the lab's modules for them, so that a lab starts without a network.

    \b
    sevchaos kernel fetch debian:7.3
    sevchaos kernel fetch debian:6.12.95+deb12-amd64
    """
    from chaos.lab.kernel.find import build_modules, find_kernel

    for source in sources:
        kernel = find_kernel(source, say=say)
        build_modules(kernel, say=say)
        click.echo(f"{source}: {kernel.release}, Linux {kernel.version}")


@kernel_.command("build")
@click.argument("source", required=False, metavar="[KERNEL]")
@click.option(
    "--with",
    "words",
    multiple=True,
    type=click.Choice(["fixes", "kasan", "kcsan"]),
    help="fixes: the findings mended. kasan: memory and locks. kcsan: races. Repeatable.",
)
@click.option("--from", "tree", metavar="PATH", help="A source tree of yours, which is not changed.")
def build(source: str | None, words: tuple[str, ...], tree: str | None) -> None:
    """Build a kernel from its sources, with the project's own small configuration.

    It takes about 20 minutes of two CPUs, 4 GB of disk while it is built and 0.5 GB afterwards, and goes on where it
    was if it is interrupted. With ccache installed the next one of the same sources takes less than half. Its name says
    what is in it, and can be given wherever a kernel is: debian:7.3+kasan, debian:7.3+fixed+kasan, and without --with
    debian:7.3+plain.

    \b
    sevchaos kernel build debian:7.3 --with kasan
    sevchaos kernel build --from ~/src/linux --with fixes --with kasan
    """
    from chaos.lab.kernel.find import build_kernel, build_modules

    if (source is None) == (tree is None):
        raise UsageError("of what?", remedy="name one of Debian's (debian:7.3), or a tree with --from PATH")
    variants = ["fixed" if word == "fixes" else word for word in words] or ["plain"]
    kernel = build_kernel(source or tree or "", variants, say=say)
    build_modules(kernel, say=say)
    click.echo(f"{kernel.source}: {kernel.release}, Linux {kernel.version}")


@kernel_.command("remove")
@click.argument("sources", nargs=-1, required=True, metavar="KERNEL…")
def remove(sources: tuple[str, ...]) -> None:
    """Remove kernels that are here, by the names that `list` has, and the modules that were built for them."""
    from chaos.lab.kernel import offers

    tell_removed(offers.remove(sources, say=say))


@kernel_.command("clean")
def clean() -> None:
    """Remove what fetching and building kernels left beside them: the archive's lists, unpacked sources, what a
    compiler made, the lab's modules, what was not finished. The kernels stay; what they need is made or fetched again.
    """
    from chaos.lab.kernel import offers

    tell_removed(offers.clean(say=say))
