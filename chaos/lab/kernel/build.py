# SPDX-License-Identifier: Apache-2.0
"""Building the lab's own kernel modules against a kernel's headers.

A module is cached under the kernel's identity and a digest of its sources, so a changed source or a rebuilt
kernel gets a new one, and two processes that build the same thing make the same thing.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from chaos.cache import entries
from chaos.cache.command import CommandResult, must, run, tool
from chaos.errors import InternalError

SOURCES = Path(__file__).parents[1] / "modules"
_PURPOSE = "to build the lab's two small kernel modules"


def build(
    name: str, *, build_dir: Path, config: Mapping[str, str], label: str, say: entries.Say, source: Path | None = None
) -> Path:
    """The built module of the folder `source`, `SOURCES/name` if it is not given, from the cache when it is there.

    `label` names and identifies the kernel. Raises HostLacks, with what the compiler said.
    """
    source = source or SOURCES / name
    if not (source / "Kbuild").is_file():
        raise InternalError(f"there is no kernel module called {name}: {source} has no Kbuild")
    folder, file = _place(name, source, label)
    module = entries.entry_path("modules", folder) / f"{file}.ko"
    if module.is_file():
        return module
    with (
        entries.locked("modules", folder, say=say) as lock,
        entries.space_guard(f"building {name}", 20 << 20),
    ):
        if module.is_file():  # whoever had the lock before us built it
            return module
        say(f"building the kernel module {name} for {label}")
        work = entries.staging("modules", folder)
        shutil.rmtree(work)  # of a process that was killed
        work.mkdir()
        done = _make(source, work, build_dir, config, lock)
        must(
            done,
            f"building the module {name} for {label}",
            remedy=f"are the headers in {build_dir} complete (make modules_prepare), and is gcc new enough?",
        )
        (work / "log").write_text(done.output)
        module.parent.mkdir(parents=True, exist_ok=True)
        (work / "log").rename(module.with_suffix(".log"))
        (work / f"{name}.ko").rename(module)
        shutil.rmtree(work)
    return module


def warnings(module: Path) -> list[str]:
    """What compiler, modpost and objtool warned of when this module was built."""
    log = module.with_suffix(".log").read_text()
    return [
        line
        for line in log.splitlines()
        if re.search(r"\bwarning\b", line, re.IGNORECASE)
        # Ours are not always the compiler and the pahole the kernel was built with; kbuild says so and goes on.
        and not re.search(r"(compiler|pahole version) differs from the one used to build the kernel", line)
    ]


def _place(name: str, source: Path, label: str) -> tuple[str, str]:
    """The cache entry, one per kernel, and the file in it, one per state of the sources."""
    digest = hashlib.sha256()
    for path in sorted(source.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return label, f"{name}-{digest.hexdigest()[:12]}"


def _make(source: Path, work: Path, build_dir: Path, config: Mapping[str, str], lock: entries.Lock) -> CommandResult:
    for path in source.iterdir():
        shutil.copy(path, work)
    make = tool("make", package="make", purpose=_PURPOSE)
    # Type information for BPF is of no use here, and would take pahole: 6.12's headers have a vmlinux for it.
    compiler = _compiler(build_dir, config)
    flags = ["CONFIG_DEBUG_INFO_BTF_MODULES=", *compiler, *_unknown_flags(compiler, config)]
    argv = [make, "-C", str(build_dir), f"M={work}", *flags, "modules"]
    # A make that started us would hand its flags and its job server down to this one.
    clean = {"MAKEFLAGS": "", "MAKELEVEL": "", "MFLAGS": "", "KBUILD_OUTPUT": "", "ARCH": "x86"}
    return run(argv, timeout=300, env=clean, keep=(lock.fd,))


def _unknown_flags(compiler: Sequence[str], config: Mapping[str, str]) -> list[str]:
    """Options of make that leave out what the kernel's compiler knew and ours does not."""
    if config.get("CC_HAS_MIN_FUNCTION_ALIGNMENT") != "y" or "LLVM=1" in compiler:
        return []
    gcc = next((word.removeprefix("CC=") for word in compiler), "gcc")
    asked = run([gcc, "-fmin-function-alignment=16", "-x", "c", "-c", "/dev/null", "-o", "/dev/null"], timeout=60)
    return ["CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT="] if asked.status else []


def _compiler(build_dir: Path, config: Mapping[str, str]) -> list[str]:
    """Flags of make that choose the compiler, none when the headers' own choice is there."""
    if config.get("CC_IS_CLANG") == "y":  # gcc would not know the flags that such headers ask for
        tool("clang", package="clang llvm lld", purpose=f"{_PURPOSE} for a kernel that clang has built")
        return ["LLVM=1"]
    wanted = "gcc"
    kernelvariables = build_dir / ".kernelvariables"  # Debian's
    if kernelvariables.is_file():
        text = kernelvariables.read_text()
        if found := re.search(r"^CC = .*?(gcc(?:-[\d.]+)?)\s*$", text, re.MULTILINE):
            wanted = found[1]
        if prefix := re.search(r"^override CROSS_COMPILE = (\S+-)$", text, re.MULTILINE):
            wanted = prefix[1] + wanted
    if shutil.which(wanted):
        tool("ld", package="binutils", purpose=_PURPOSE)
        return []
    tool("gcc", package="gcc", purpose=_PURPOSE)
    return ["CC=gcc"]
