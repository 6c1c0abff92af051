# SPDX-License-Identifier: Apache-2.0
"""Debian's archive, as apt sees it by lists of our own: every suite in which there are kernels, whatever this machine
runs.

The lists, and what apt makes of them, are in the cache, so they belong to the user and need no root; of the machine's
own configuration only two things are used, and nothing is changed: the mirror that it takes Debian from, if it does,
and Debian's keyring, against which apt verifies every list.

The lists are fetched when there are none, and when somebody asks for it (`refresh`), never behind anybody's back: what
`debian:6.12` means changes only then.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

from chaos.cache import entries
from chaos.cache.command import CommandResult, must, run
from chaos.cache.entries import Say
from chaos.errors import NoKernel

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR, SECURITY = "http://deb.debian.org/debian/", "http://deb.debian.org/debian-security/"
# By the label that apt's lists give the archive: where it is if this machine does not say, and its suites.
SUITES = {
    "Debian": (
        MIRROR,
        (
            "bookworm", "bookworm-updates", "bookworm-backports", "trixie", "trixie-updates", "trixie-backports",
            "sid", "experimental",
        ),
    ),
    "Debian-Security": (SECURITY, ("bookworm-security", "trixie-security")),
}  # fmt: skip
HOW_OTHERWISE = (
    "name another kernel: --kernel running, --kernel installed:RELEASE, or --kernel PATH of a kernel build tree"
)
_ENTRY = ("apt", "debian")
_RELEASE_FILE = re.compile(r"^'(\S+/)dists/([^/\s]+)/InRelease' ", re.MULTILINE)
_EVIDENCE = {
    "Debian": 2,
    "Debian-Security": 1,
}  # suites of a place that make it a mirror; `…-security` is Debian's alone
_SPACE = 160 << 20  # bytes: the lists, and what apt makes of them
# On the command line, for apt's other files, whose proxies and the like are wanted, would have the last word otherwise.
_OPTIONS = {
    "Dir::Etc::SourceList": "{folder}/sources.list",
    "Dir::Etc::SourceParts": "/dev/null",
    "Dir::Etc::Preferences": "/dev/null",
    "Dir::Etc::PreferencesParts": "/dev/null",
    "Dir::State::Lists": "{folder}/lists",
    "Dir::State::Status": "{folder}/status",
    "Dir::Cache": "{folder}/cache",
    "Dir::Cache::pkgcache": "pkgcache.bin",
    "Dir::Cache::srcpkgcache": "",
    "APT::Architecture": "amd64",
    "APT::Architectures::": "amd64",
    "APT::Sandbox::User": "",
    "Acquire::Languages": "none",
    "Acquire::Retries": "3",
    "Acquire::http::Timeout": "30",
    "Acquire::https::Timeout": "30",
}


_REFETCH = "`sevchaos kernel list --refresh` fetches them anew"


def lists() -> Path:
    return entries.entry_path(*_ENTRY) / "lists"


def fetched() -> Path:
    """A file that is as old as the lists. It is not there if fetching them never came to its end: half of them would
    name an older kernel the newest. In it are the suites that there is no list of."""
    return entries.entry_path(*_ENTRY) / "fetched"


def lacking() -> tuple[str, ...]:
    """The suites of which no list was to be had, or which the mirror does not have."""
    try:
        return tuple(fetched().read_text().split())
    except OSError:
        return ()


def apt(program: str, *arguments: str, say: Say) -> list[str]:
    """What runs apt-get or apt-cache on our lists, which are fetched if there are none.

    Raises NoKernel where there is no apt, no keyring or no list to be had.
    """
    argv = _on_ours(program, *arguments)
    if not fetched().exists():
        refresh(say=say)
    return argv


def ask(*arguments: str, say: Say) -> str:
    """What apt-cache answers, from our lists. Packages that it does not know are left out of the answer.

    Raises NoKernel where there is no list to be had or to be read, and NoSpace.
    """
    done = run(apt("apt-cache", *arguments, say=say), timeout=600)
    lines = done.output.splitlines()
    if done.status and [line for line in lines if line.startswith("E: ")] != ["E: No packages found"]:
        must(done, "reading Debian's package lists", error=NoKernel, remedy=_REFETCH)
    return "\n".join(line for line in lines if not line.startswith(("E: ", "N: ", "W: ")))


def refresh(*, say: Say) -> None:
    """Fetch the lists. Those that cannot be had are told; older ones of the same suites stay in use.

    Raises NoKernel if there is none at all then.
    """
    with entries.locked(*_ENTRY, say=say) as lock, entries.space_guard("fetching Debian's package lists", _SPACE):
        entries.check_space(_SPACE, "fetching Debian's package lists")
        _configure()
        say("fetching Debian's package lists (32 MB, to the cache)")
        done = run(_on_ours("apt-get", "update", "-q"), timeout=600, keep=(lock.fd,))
        missing = [suite for _, suites in SUITES.values() for suite in suites if not _has(suite)]
        if not any(lists().glob("*_Packages*")) or (missing and _failed(done).disk_full):
            must(_failed(done), "fetching Debian's package lists", error=NoKernel, remedy=_remedy())
        if missing:
            say(f"no list was to be had of {', '.join(missing)}: {done.last_lines(1)}")
        # apt-cache reads what apt made of the lists, and does not write it: without this each question takes seconds.
        made = run(_on_ours("apt-cache", "gencaches"), timeout=600, keep=(lock.fd,))
        must(made, "reading Debian's package lists", error=NoKernel, remedy=_REFETCH)
        entries.write_whole(fetched(), " ".join(missing).encode())


def _failed(done: CommandResult) -> CommandResult:
    """apt-get update exits 0 although it fetched nothing."""
    return CommandResult(done.argv, done.status or 100, done.output)


def _remedy() -> str:
    return f"is there a network? What has come is kept, and the next try goes on from it. Or {HOW_OTHERWISE}"


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise NoKernel("kernels named debian:… are fetched with apt, and this machine has none", remedy=HOW_OTHERWISE)
    return found


def _has(suite: str) -> bool:
    return any(lists().glob(f"*_dists_{suite}_main_binary-amd64_Packages*"))


def _on_ours(program: str, *arguments: str) -> list[str]:
    folder = entries.entry_path(*_ENTRY)
    options = (word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value.format(folder=folder)}"))
    return [_program(program), *options, *arguments]


def _configure() -> None:
    """Make what apt wants to be there, and write the sources, anew each time: the mirror may be another by now."""
    folder = entries.entry_path(*_ENTRY)
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    mirrors = _mirrors()
    signed = f" signed-by={_keyring()}"
    lines = [
        f"deb [arch=amd64{signed}] {mirrors.get(label, default)} {suite} main\n"
        for label, (default, suites) in SUITES.items()
        for suite in suites
    ]
    (folder / "sources.list").write_text("".join(lines))
    (folder / "status").touch()


def _keyring() -> Path:
    if not KEYRING.is_file():
        raise NoKernel(
            f"Debian's kernels are verified with Debian's keyring, and {KEYRING} is not there",
            remedy=f"install debian-archive-keyring (Debian's and Ubuntu's name for it), or {HOW_OTHERWISE}",
        )
    return KEYRING


def _mirrors() -> dict[str, str]:
    """From where this machine takes Debian, by label; nothing if it is another distribution.

    Asked of what its sources name, for its lists need not be there. Others have a `bookworm` too, but not its updates
    and backports: so of several places it is the one with most of the suites, and one alone is no evidence.
    """
    named = run([_program("apt-get"), "update", "--print-uris"], timeout=600, merge=False).output
    places: dict[str, Counter[str]] = {label: Counter() for label in SUITES}
    for mirror, suite in _RELEASE_FILE.findall(named):
        for label, (_, suites) in SUITES.items():
            places[label][mirror] += suite in suites
    best = {label: counted.most_common(1)[0] for label, counted in places.items() if counted}
    return {label: mirror for label, (mirror, suites) in best.items() if suites >= _EVIDENCE[label]}
