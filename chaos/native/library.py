# SPDX-License-Identifier: Apache-2.0
"""The compiled library: found, or built once and cached.

It is plain C behind ctypes, so it needs a C compiler but no headers of Python's, and one build serves every Python.
In the lab, which has no compiler, it lies beside its sources' place; `chaos.lab.image` puts it there.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
from pathlib import Path

from chaos.cache import entries
from chaos.cache.command import must, run, tool
from chaos.cache.entries import Say
from chaos.cache.wholefile import keep_newest
from chaos.errors import HostLacks, InternalError
from chaos.native.layout import SIZES, LoopPlan

HERE = Path(__file__).parent
NAME = "libnative.so"  # not loops.so: Python would import that for `loops`
SOURCES = ("crew.c", "loops.c", "failing.c", "native.h", "clock.h")
FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", "-D_GNU_SOURCE")
_KEPT = 8


@functools.cache
def load() -> ctypes.CDLL:
    """The library, ready to be called. Raises `HostLacks` if it is not built yet and there is no compiler."""
    path = find()
    library = ctypes.CDLL(str(path))
    sizes = tuple((ctypes.c_uint32 * len(SIZES)).in_dll(library, "native_sizes"))
    if sizes != SIZES:
        raise InternalError(f"{path} was built from other sources: its structures have {sizes} bytes, ours {SIZES}")
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    crew, number, fd, offset = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint64
    ns, port = ctypes.c_uint64, ctypes.c_uint16
    library.crew_new.argtypes, library.crew_new.restype = (number, fd), ctypes.c_void_p
    library.crew_set_loop.argtypes = (crew, number, ctypes.POINTER(LoopPlan), fd, offset)
    library.crew_set_vcpu.argtypes = (crew, number, fd, ctypes.c_void_p, ctypes.c_uint64, port, port, fd, offset, ns)
    library.crew_start.argtypes = (crew, ns, ns, fd, ctypes.POINTER(ctypes.c_uint64))
    for name in ("crew_stop", "crew_interrupt", "crew_join", "crew_free"):
        getattr(library, name).argtypes = (crew,)
    out, word = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(number)
    library.ioctl_failing.argtypes = (fd, number, fd, ctypes.c_ulong, ctypes.c_void_p, out, out, word)
    library.close_failing.argtypes = (fd, number, fd, out, out, word)
    library.crew_stop.restype = library.crew_interrupt.restype = None


def find(*, say: Say = lambda text: None) -> Path:
    """Where it is; builds it if need be. Raises `HostLacks`."""
    beside = HERE / NAME
    return beside if beside.is_file() else _cached(say)


def _cached(say: Say) -> Path:
    sources = _sources_digest()
    try:
        compiler = Path(tool("cc", package="gcc libc6-dev", purpose="to build the engine's native loops"))
    except HostLacks:
        # One that another compiler has built is as good. What matters is that the sources are these.
        for path in sorted(entries.entry_path("native", "x").parent.glob(f"libnative-{sources}-*.so")):
            return path
        raise
    path = entries.entry_path("native", f"libnative-{sources}-{_compiler_digest(compiler)}.so")
    if not path.is_file():
        _build(compiler, path, say)
    return path


def _sources_digest() -> str:
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for name in SOURCES:
        digest.update(name.encode() + b"\0" + (HERE / name).read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _compiler_digest(compiler: Path) -> str:
    """Told from the file: to ask the program would cost every start a process."""
    real = compiler.resolve()
    stat = real.stat()
    return hashlib.sha256(f"{real} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]


def _build(compiler: Path, path: Path, say: Say) -> None:
    room = entries.space_guard("building the native loops", 1 << 20)
    with entries.locked("native", path.name, say=say) as lock, room:
        if path.is_file():  # whoever had the lock before us built it
            return
        say("building the engine's native loops")
        work = entries.staging("native", path.name)
        shutil.rmtree(work)  # of a process that was killed
        work.mkdir()
        sources = [str(HERE / name) for name in SOURCES if name.endswith(".c")]
        done = run([str(compiler), *FLAGS, "-o", str(work / NAME), *sources], timeout=120, keep=(lock.fd,))
        must(
            done,
            "building the engine's native loops",
            remedy="install a C compiler with the headers of the C library and of Linux"
            " (Debian: apt-get install gcc libc6-dev)",
        )
        (work / NAME).rename(path)
        shutil.rmtree(work)
    keep_newest("native", "libnative-*.so", _KEPT)
