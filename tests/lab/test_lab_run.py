# SPDX-License-Identifier: Apache-2.0
"""`sevchaos lab run`: a program of anybody's on a SEV host."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from chaos.errors import ExitCode
from chaos.lab.image import ModuleTree
from chaos.lab.kernel.find import find_kernel
from tests.lab.conftest import Sevchaos

pytestmark = pytest.mark.lab


@pytest.mark.parametrize(
    ("asids", "expected"),
    [
        ((), "sev 8\nsev_es 7\n"),
        (("--asids", "509"), "sev 509\nsev_es 7\n"),
        (("--asids", "1006:3"), "sev 1006\nsev_es 3\n"),
    ],
)
def test_the_host_has_the_asids_that_were_asked_for(
    in_lab: Sevchaos, kernel: str, asids: tuple[str, ...], expected: str
) -> None:
    done = in_lab("cat", "/sys/fs/cgroup/misc.capacity", options=["--kernel", kernel, *asids])
    assert (done.returncode, done.stdout.decode()) == (0, expected), done.stderr.decode()


def test_the_kernel_is_the_stock_one_and_its_drivers_accept_the_psp(in_lab: Sevchaos, kernel: str) -> None:
    done = in_lab("sh", "-c", "uname -r; dmesg; ls -l /dev/sev", options=["--kernel", kernel])
    text = done.stdout.decode()
    assert text.splitlines()[0] == find_kernel(kernel).release
    assert "SEV enabled (ASIDs 8 - 15)" in text
    assert "SEV-ES enabled (ASIDs 1 - 7)" in text
    assert "/dev/sev" in text


def test_streams_are_kept_apart_and_the_exit_code_comes_through(in_lab: Sevchaos) -> None:
    done = in_lab("sh", "-c", "cat; echo out; echo err >&2; exit 7", stdin=b"in\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"in\nout\n", b"err\n")


def test_signals_have_their_ordinary_meaning(in_lab: Sevchaos) -> None:
    assert in_lab("sh", "-c", "kill -INT $$; echo survived").returncode == 128 + 2


def test_a_death_by_signal_is_told_as_a_shell_tells_it(in_lab: Sevchaos) -> None:
    assert in_lab("sh", "-c", "kill -SEGV $$").returncode == 128 + 11


def test_a_program_that_is_not_there(sevchaos: Sevchaos) -> None:
    done = sevchaos("lab", "run", "--", "no-such-program")
    assert done.returncode == 127
    assert b"no-such-program: No such file or directory" in done.stderr


def test_streams_carry_any_bytes_in_any_amount(in_lab: Sevchaos) -> None:
    data = random.Random(1).randbytes(9_000_001)
    done = in_lab("cat", stdin=data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_input_that_nobody_reads_does_not_hold_anything_up(in_lab: Sevchaos) -> None:
    assert in_lab("true", stdin=bytes(5_000_000)).returncode == 0


def test_a_copied_program_brings_its_libraries(in_lab: Sevchaos, tmp_path: Path) -> None:
    # /bin/ls of the machine, dynamically linked, under a name that busybox does not know.
    program = tmp_path / "list-it"
    program.write_bytes(Path("/bin/ls").read_bytes())
    program.chmod(0o755)
    (tmp_path / "data").write_text("x")
    options = ["--copy", str(program), "--copy", str(tmp_path / "data")]
    done = in_lab("./list-it", "--almost-all", options=options)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"data\nlist-it\n", b"")


def test_a_module_is_loaded_with_its_parameters(in_lab: Sevchaos, kernel: str, tmp_path: Path) -> None:
    tree = ModuleTree.read(find_kernel(kernel).modules)
    module = tmp_path / "dummy.ko"
    module.write_bytes(tree.contents(tree.closure("dummy")[-1]))
    done = in_lab("ls", "/sys/class/net", options=["--kernel", kernel, "--insmod", f"{module},numdummies=3"])
    assert done.stdout.split() == [b"dummy0", b"dummy1", b"dummy2", b"lo"]


def test_the_driver_is_loaded_with_its_parameters(in_lab: Sevchaos) -> None:
    read = ("cat", *(f"/sys/module/ccp/parameters/{name}" for name in ("init_ex_path", "psp_cmd_timeout")))
    done = in_lab(*read, options=["--ccp", "init_ex_path=/run/psp/state", "--ccp", "psp_cmd_timeout=7"])
    assert (done.returncode, done.stdout) == (0, b"/run/psp/state\n7\n"), done.stderr.decode()
    done = in_lab("true", options=["--ccp", "init_ex_path"])
    assert done.returncode == ExitCode.USAGE
    assert b"'init_ex_path' is not NAME=VALUE" in done.stderr


def test_a_module_that_cannot_be_loaded_says_so(in_lab: Sevchaos, tmp_path: Path) -> None:
    module = tmp_path / "broken.ko"
    module.write_bytes(b"not a module")
    done = in_lab("true", options=["--insmod", str(module)])
    assert done.returncode == ExitCode.USAGE
    assert b"insmod" in done.stderr


def test_python_and_sevchaos_are_there(in_lab: Sevchaos) -> None:
    done = in_lab("sh", "-c", "python3 -c 'import pyroute2, cgroupspy, ctypes; print(2)'; sevchaos --version")
    assert (done.returncode, done.stdout[:2]) == (0, b"2\n")
    assert b"sevchaos" in done.stdout


def test_a_cold_lab_is_the_same_lab(in_lab: Sevchaos, kernel: str) -> None:
    done = in_lab("cat", "/sys/fs/cgroup/misc.capacity", options=["--kernel", kernel, "--cold"])
    assert done.stdout == b"sev 8\nsev_es 7\n"
