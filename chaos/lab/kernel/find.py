# SPDX-License-Identifier: Apache-2.0
"""Kernels for the lab: where they come from, and what makes one fit.

    debian:6.12, debian:7.3       the newest one of the series in Debian's archive
    debian:6.1.0-47-amd64         one by its ABI name, debian:6.12.100+deb12-amd64 likewise
    running                       the running system's image and modules
    installed:RELEASE             another one that is installed (`uname -r` when it runs)
    PATH                          a kernel build tree
    debian:7.3+kasan, PATH+fixed  one that was built here: see `built.py`

A kernel that cannot carry the lab is refused here, with every option it lacks, and not by a boot that fails.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos.cache.entries import Say
from chaos.errors import HostLacks, UsageError
from chaos.lab.kernel import build, built, fetched, local
from chaos.lab.kernel.kconfig import memory_wanted, parameters_wanted, read_config, slowness

ALLOWED = (
    "debian:SERIES (debian:6.1), debian:ABI (debian:6.1.0-47-amd64), running, installed:RELEASE,"
    " the path of a kernel build tree, or what `sevchaos kernel build` has built (debian:7.3+kasan)"
)


@dataclass(frozen=True, slots=True)
class LabKernel:
    """A kernel that is there and fits. Directories are absolute."""

    source: str  # as the user asked: "debian:6.12"
    release: str  # uname -r: "6.12.117+deb12-amd64"
    version: str  # x.y.z: behaviour belongs to this; Debian's 6.1 has only the ABI in its release
    image: Path  # bzImage
    modules: Path  # .../lib/modules/RELEASE
    build: Path  # for make -C
    identity: str  # changes when image, modules or build change
    memory: int = 1 << 30  # bytes that a lab of it wants
    parameters: str = ""  # more for its command line
    slowness: int = 1  # by which deadlines are longer


def silent(_: str) -> None:
    """A `say` for callers with nobody to talk to."""


def default_kernels() -> tuple[str, str]:
    """The sources that everything is tested with: the oldest that a Debian of today has, and the newest."""
    return ("debian:6.12", "debian:7.3")


def night_kernels() -> tuple[str, ...]:
    """The sources that everything is tested with at night."""
    return ("debian:6.1", *default_kernels())


def find_kernel(source: str, *, say: Say = silent, system: Path = Path("/")) -> LabKernel:
    """The kernel that `source` names, fetched when it is not there yet. `system` is where `/boot` is.

    Raises UsageError for a source that cannot be one, NoKernel for a kernel that cannot be had or does not
    fit, HostLacks and NoSpace when the machine is at fault.
    """
    if platform.machine() != "x86_64":
        raise HostLacks("the lab runs x86-64 kernels, and so must this machine", remedy="use an x86-64 machine")
    recipe = None if Path(source).is_dir() else built.parse(source)
    if recipe is not None:
        found = built.find(recipe, say=say)
    elif source.startswith("debian:"):
        found = fetched.find(source.removeprefix("debian:"), say=say)
    elif source == "running":
        found = local.find_installed(platform.release(), system)
    elif source.startswith("installed:") and len(source) > len("installed:"):
        found = local.find_installed(source.removeprefix("installed:"), system)
    elif "/" in source or (source and Path(source).is_dir()):
        found = local.find_tree(Path(source).expanduser().absolute(), say=say)
    else:
        raise UsageError(f"{source!r} names no kernel", remedy=f"allowed are: {ALLOWED}")
    return _lab_kernel(source, found)


def _lab_kernel(source: str, found: fetched.Found) -> LabKernel:
    config = read_config(found.build / ".config")
    return LabKernel(
        source=source,
        release=found.release,
        version=found.version,
        image=found.image,
        modules=found.modules,
        build=found.build,
        identity=found.identity,
        memory=memory_wanted(config),
        parameters=parameters_wanted(config),
        slowness=slowness(config),
    )


def build_kernel(base: str, words: Sequence[str], *, say: Say) -> LabKernel:
    """The kernel of these sources (`debian:7.3`, or the path of a tree) built with these variants, unless it is there.
    Raises UsageError, NoKernel, HostLacks, NoSpace."""
    recipe = built.recipe(base, words)
    return _lab_kernel(str(recipe), built.build(recipe, say=say))


def find_busybox(*, say: Say = silent) -> Path:
    """A static busybox. The lab's init and shell are made of it."""
    return fetched.find_busybox(say=say)


def build_module(kernel: LabKernel, name: str, *, say: Say = silent, source: Path | None = None) -> Path:
    """The module of the folder `source`, or else `modules/NAME`, built for this kernel: the path of the .ko. Raises
    HostLacks."""
    return build.build(
        name,
        build_dir=kernel.build,
        config=read_config(kernel.build / ".config"),
        label=f"{kernel.release}_{kernel.identity[:12]}",
        say=say,
        source=source,
    )


def build_modules(kernel: LabKernel, *, say: Say = silent) -> None:
    """All of the lab's modules for this kernel, so that a lab need not build them. Raises HostLacks."""
    for name in sorted(path.name for path in build.SOURCES.iterdir() if (path / "Kbuild").is_file()):
        build_module(kernel, name, say=say)


def module_warnings(kernel: LabKernel, name: str) -> list[str]:
    """What was warned of when `name` was built for this kernel; the tests want none."""
    return build.warnings(build_module(kernel, name))
