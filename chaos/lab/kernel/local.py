# SPDX-License-Identifier: Apache-2.0
"""Kernels that are on this machine already: installed ones, and build trees."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from chaos.cache import entries
from chaos.cache.command import must, run, tool
from chaos.cache.entries import Say
from chaos.errors import NoKernel
from chaos.lab.kernel.fetched import Found
from chaos.lab.kernel.kconfig import check_config, full_version, read_config

_BZIMAGE = "arch/x86/boot/bzImage"
# How many gathered module sets of one build tree are kept: today's, and the one before for comparing.
_KEPT = 2


def find_installed(release: str, system: Path) -> Found:
    """The kernel that `uname -r` calls `release`. Raises NoKernel, naming what is not there."""
    modules = system / "lib" / "modules" / release
    if not modules.is_dir():
        raise NoKernel(
            f"there are no modules of {release}: {modules} is not there",
            remedy=f"install the kernel, or use another: {_installed(system)}",
        )
    image = _readable(
        [system / "boot" / f"vmlinuz-{release}", modules / "vmlinuz"],
        f"image of {release}",
        "install the kernel's image; where only root may read it: chmod a+r",
    )
    build = (modules / "build").resolve()
    config = _readable(
        [system / "boot" / f"config-{release}", modules / "config", build / ".config"],
        f"configuration of {release}",
        f"install linux-headers-{release} or what holds it here",
    )
    if not (build / "Makefile").is_file() or not (build / ".config").is_file():
        raise NoKernel(
            f"there are no headers of {release}, and the lab builds two small modules: {modules}/build leads nowhere",
            remedy=f"install linux-headers-{release} (Fedora: kernel-devel-{release})",
        )
    check_config(read_config(config), f"the installed kernel {release}")
    return Found(
        release=release,
        version=full_version(config) or _leading_version(release),
        image=image,
        modules=modules,
        build=build,
        identity=_identity(
            [image, modules / "modules.dep", config, build / "Module.symvers", build / ".config"],
            _modules(modules),
        ),
    )


def _installed(system: Path) -> str:
    found = sorted(p.name for p in (system / "lib" / "modules").glob("*") if (p / "modules.dep").is_file())
    here = ", ".join(f"installed:{name}" for name in found)
    return f"{here}, or debian:6.12" if here else "debian:6.12, or the path of a kernel build tree"


def _readable(places: Iterable[Path], what: str, remedy: str) -> Path:
    places = list(places)
    for path in places:
        if path.is_file() and os.access(path, os.R_OK):
            return path
    there = [str(path) for path in places if path.is_file()]
    if there:
        raise NoKernel(f"the {what} may not be read: {', '.join(there)}", remedy=remedy)
    raise NoKernel(f"no {what} was found; looked at {', '.join(map(str, places))}", remedy=remedy)


def find_tree(tree: Path, *, say: Say) -> Found:
    """The kernel of a build tree, with its modules gathered in the cache. Raises NoKernel, NoSpace."""
    image, config = tree / _BZIMAGE, tree / ".config"
    for path, target in ((config, "olddefconfig"), (image, "bzImage"), (tree / "modules.order", "modules")):
        if not path.is_file():
            raise NoKernel(
                f"{tree} is not a kernel build tree with everything built: {path.relative_to(tree)} is not there",
                remedy=f"give the directory that holds the build's results, after `make {target}` there",
            )
    check_config(read_config(config), f"the kernel in {tree}")
    release = _tree_release(tree)
    identity = _identity([image, config, tree / "Module.symvers"], _ordered_modules(tree))
    return Found(
        release=release,
        version=full_version(config) or _leading_version(release),
        image=image,
        modules=_gather(tree, release, identity, say) / "lib" / "modules" / release,
        build=tree,
        identity=identity,
    )


def _tree_release(tree: Path) -> str:
    path = tree / "include" / "config" / "kernel.release"
    try:
        return path.read_text().strip()
    except OSError as error:
        why = f"cannot read {path}: {error.strerror}"
        raise NoKernel(why, remedy=f"build the kernel in {tree}") from error


def _leading_version(release: str) -> str:
    found = re.match(r"\d+\.\d+(\.\d+)?", release)
    return found[0] if found else release


def _ordered_modules(tree: Path) -> list[Path]:
    # Since 6.2 the lines name .o files, before that .ko; the modules lie beside either way.
    lines = (tree / "modules.order").read_text().split()
    return [(tree / line).with_suffix(".ko") for line in lines]


def _modules(modules: Path) -> list[Path]:
    return sorted(path for path in modules.rglob("*.ko*") if path.is_file())


def _identity(files: Iterable[Path], modules: Iterable[Path]) -> str:
    """Over names, sizes and times: a rebuild changes a time, and reading everything would take seconds."""
    digest = hashlib.sha256()
    for path in (*files, *modules):
        try:
            stat = path.stat()
        except FileNotFoundError:
            digest.update(f"{path} is not there\n".encode())
            continue
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _gather(tree: Path, release: str, identity: str, say: Say) -> Path:
    """The tree's modules as `modules_install` lays them out, in the cache."""
    family = f"{release}_{hashlib.sha256(str(tree).encode()).hexdigest()[:8]}"
    name = f"{family}_{identity[:12]}"
    final = entries.entry_path("trees", name)
    if final.is_dir():
        return final
    with entries.locked("trees", name, say=say) as lock, entries.space_guard("gathering modules", 200 << 20):
        if final.is_dir():  # whoever had the lock before us gathered them
            return final
        say(f"gathering the modules of {release} from {tree}")
        staging = entries.staging("trees", name)
        shutil.rmtree(staging)
        staging.mkdir()
        make = tool("make", package="make", purpose="to gather a build tree's modules")
        argv = [make, "-C", str(tree), f"INSTALL_MOD_PATH={staging}", "INSTALL_MOD_STRIP=1", "DEPMOD=true"]
        must(
            run(
                [*argv, "modules_install"],
                timeout=600,
                keep=(lock.fd,),
                env={"MAKEFLAGS": "", "MAKELEVEL": ""},
            ),
            f"gathering the modules of {tree}",
            remedy="does `make modules_install INSTALL_MOD_PATH=/some/where` work in it?",
        )
        depmod = tool("depmod", package="kmod", purpose="to index a kernel's modules")
        must(
            run([depmod, "-b", str(staging), release], timeout=300, keep=(lock.fd,)),
            f"indexing the modules of {tree}",
            remedy="see what depmod says",
        )
        for link in ("build", "source"):
            (staging / "lib" / "modules" / release / link).unlink(missing_ok=True)
        entries.publish(staging, "trees", name)
    _forget_older(family)
    return final


def _forget_older(family: str) -> None:
    """A kernel developer rebuilds all day; keep the newest few only."""
    mine = [p for p in entries.entry_path("trees", "").iterdir() if p.name.startswith(f"{family}_")]
    for path in sorted(mine, key=lambda p: p.stat().st_mtime)[:-_KEPT]:
        entries.discard(path)
