# SPDX-License-Identifier: Apache-2.0
"""The set-up script, on machines made of a few fake programs. Nothing here is installed, and no root is used."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = (
    *("bash", "cat", "chmod", "dirname", "env", "find", "flock", "grep", "head", "mkdir", "rm", "sed", "sh"),
    *("sha256sum", "sort", "tail", "tee", "touch", "uname"),
)
PACKAGES = ("binutils", "gcc", "kmod", "libc6-dev", "libelf1", "libssl3", "make")


class Machine:
    """A machine on which a program is there only if a test says so."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.checkout = where / "checkout"
        self.bin = where / "bin"
        self.bin.mkdir()
        (self.checkout / "setup").mkdir(parents=True)
        for name in ("setup/setup.sh", "setup/constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.checkout / name)
        for name in TOOLS:
            found = shutil.which(name)
            assert found is not None, name
            (self.bin / name).symlink_to(found)
        (where / "installed").write_text("\n".join([*PACKAGES, "python3", "python3-venv"]) + "\n")
        self.system("debian", "12", "Debian GNU/Linux 12 (bookworm)")
        self.program("id", "echo 1000")
        self.program("python3", ":")
        self.program("dpkg-query", f'grep -qx "${{@: -1}}" {where}/installed && printf installed')
        self.program("apt-cache", f"if [ -e {where}/backports ]; then echo bookworm-backports; fi")
        self.program("apt-get", "echo http://mirror.example/debian/")
        # Whatever is done as root goes through here, and is written down instead.
        self.program(
            "sudo",
            f"""
            if [ "$*" = "-n true" ]; then exit 0; fi
            echo "$*" >>{where}/root.log
            if [ "$1" = tee ]; then cat >>{where}/root.log; touch {where}/backports; fi
            case "$*" in
            *unreachable*) exit 1 ;;
            *install*qemu-system-x86*) echo 'echo "QEMU emulator version 10.0.2"' >{self.bin}/qemu-system-x86_64
                chmod +x {self.bin}/qemu-system-x86_64 ;;
            esac""",
        )
        self.qemu("10.0.2")
        self.venv()

    def program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def qemu(self, version: str) -> None:
        self.program("qemu-system-x86_64", f'echo "QEMU emulator version {version} (Debian)"')

    def without(self, *names: str) -> None:
        for name in names:
            (self.bin / name).unlink()

    def not_installed(self, *names: str) -> None:
        installed = self.where / "installed"
        left = [name for name in installed.read_text().split() if name not in names]
        installed.write_text("\n".join(left) + "\n")

    def system(self, name: str, version: str, pretty: str) -> None:
        text = f'ID={name}\nVERSION_ID="{version}"\nPRETTY_NAME="{pretty}"\n'
        (self.where / "os-release").write_text(text)

    def venv(self) -> None:
        programs = self.checkout / ".venv" / "bin"
        programs.mkdir(parents=True)
        (programs / "python").write_text(f'#!/bin/bash\necho "$*" >>{self.where}/python.log\n')
        (programs / "python").chmod(0o755)
        (programs / "pip").write_text(f"#!{programs}/python\n")

    def set_up(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.checkout / "setup" / "setup.sh"],
            env={"PATH": str(self.bin), "SEVCHAOS_OS_RELEASE": str(self.where / "os-release")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def log(self, name: str) -> list[str]:
        path = self.where / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_with_everything_there_nothing_is_said_or_done(machine: Machine) -> None:
    assert machine.set_up().returncode == 0  # the first time fills the virtual environment
    (machine.where / "python.log").unlink()
    done = machine.set_up()
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert machine.log("root") == []
    assert machine.log("python") == ["setup/pins.py", "setup/kernels.py"]


def test_missing_packages_are_named_before_they_are_installed(machine: Machine) -> None:
    machine.not_installed("kmod", "gcc")
    done = machine.set_up()
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == "setup: about to install, with apt-get as root: gcc kmod"
    update, install = machine.log("root")
    assert update.endswith(" update")
    assert install.endswith(" install --no-install-recommends gcc kmod")


def test_a_python_without_venv_is_a_missing_package(machine: Machine) -> None:
    machine.program("python3", "exit 1")
    machine.not_installed("python3-venv")
    done = machine.set_up()
    assert "about to install, with apt-get as root: python3-venv" in done.stderr


def test_without_root_the_packages_are_named_and_nothing_is_tried(machine: Machine) -> None:
    machine.not_installed("kmod")
    machine.program("sudo", f"echo tried >>{machine.where}/root.log; exit 1")
    done = machine.set_up()
    assert done.returncode == 69
    assert "about to install, with apt-get as root: kmod" in done.stderr
    assert "this needs root" in done.stderr
    assert machine.log("root") == ["tried"]  # sudo -n true, which asks nobody


def test_qemu_comes_from_the_backports_of_the_mirror_in_use(machine: Machine) -> None:
    machine.without("qemu-system-x86_64")
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    assert "qemu-system-x86 from the bookworm-backports suite" in done.stderr
    assert "adding /etc/apt/sources.list.d/sevchaos-backports.list" in done.stderr
    log = machine.log("root")
    assert "tee /etc/apt/sources.list.d/sevchaos-backports.list" in log
    assert any(
        line.startswith("deb ") and line.endswith("http://mirror.example/debian/ bookworm-backports main")
        for line in log
    )
    assert log[-1].endswith("-t bookworm-backports qemu-system-x86")


def test_backports_that_are_there_already_are_not_added(machine: Machine) -> None:
    machine.without("qemu-system-x86_64")
    (machine.where / "backports").touch()
    done = machine.set_up()
    assert "adding" not in done.stderr
    assert machine.log("root")[-1].endswith("-t bookworm-backports qemu-system-x86")


def test_without_backports_debians_own_is_installed_with_a_notice(machine: Machine) -> None:
    machine.without("qemu-system-x86_64")
    machine.program("apt-cache", "true")  # never knows of backports
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    log = machine.log("root")
    assert "rm -f /etc/apt/sources.list.d/sevchaos-backports.list" in log
    assert log[-1].endswith("install --no-install-recommends qemu-system-x86")
    assert "notice: with this QEMU the lab runs in a single thread" in done.stderr


def test_an_old_qemu_is_replaced_where_root_is_at_hand_but_not_tried_for_at_every_run(
    machine: Machine,
) -> None:
    machine.qemu("7.2.22")
    machine.program("apt-cache", "true")
    first = machine.set_up()
    assert "single thread" in first.stderr
    assert not any(line.endswith("qemu-system-x86") for line in machine.log("root"))  # it has one
    (machine.where / "root.log").unlink()
    second = machine.set_up()
    assert (second.returncode, second.stderr) == (0, "")
    assert machine.log("root") == []


def test_an_old_qemu_is_good_enough_without_root(machine: Machine) -> None:
    machine.qemu("7.2.22")
    machine.without("sudo")
    done = machine.set_up()
    assert done.returncode == 0
    assert "QEMU" not in done.stderr


def test_programs_that_say_more_than_is_read_are_understood(machine: Machine) -> None:
    """A pipe that is closed early is a failure to `set -o pipefail`; it once made backports look unreachable."""
    more = "for i in {1..20000}; do echo more and more; done"
    machine.program("apt-cache", f"if [ -e {machine.where}/backports ]; then echo bookworm-backports; {more}; fi")
    machine.program("apt-get", f"echo http://mirror.example/debian/; {more}")
    machine.program("qemu-system-x86_64", f"echo QEMU emulator version 7.2.0; {more}")
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    assert "about to install, with apt-get as root: qemu-system-x86" in done.stderr
    assert machine.log("root")[-1].endswith("-t bookworm-backports qemu-system-x86")


def test_elsewhere_what_is_missing_is_named_and_how_to_bring_a_kernel(machine: Machine) -> None:
    machine.system("fedora", "41", "Fedora Linux 41")
    for name in ("gcc", "make"):
        machine.program(name, ":")
    done = machine.set_up()
    assert done.returncode == 69
    first, how, flags = done.stderr.splitlines()
    assert "this is Fedora Linux 41" in first
    assert "dnf install gcc" in how
    assert "ld" in first.partition("Missing here: ")[2]
    assert "gcc" not in first
    for flag in ("--kernel running", "--kernel installed:RELEASE", "--kernel PATH"):
        assert flag in flags
    assert machine.log("root") == []


@pytest.mark.parametrize(("name", "installs"), [("arch", "pacman -S gcc"), ("linuxmint", "package manager")])
def test_elsewhere_it_is_told_what_installs_it(machine: Machine, name: str, installs: str) -> None:
    machine.system(name, "1", name)
    assert installs in machine.set_up().stderr


@pytest.mark.parametrize(
    ("name", "version", "missing"),
    [
        ("debian", "13", "libelf1t64 libssl3t64"),
        ("ubuntu", "24.04", "debian-archive-keyring libelf1t64 libssl3t64"),
        ("ubuntu", "26.04", "debian-archive-keyring libelf1t64 libssl3t64"),
    ],
)
def test_each_distribution_has_names_of_its_own(machine: Machine, name: str, version: str, missing: str) -> None:
    machine.system(name, version, name)
    machine.qemu("8.2.2")
    done = machine.set_up()
    assert done.stderr.splitlines()[0] == f"setup: about to install, with apt-get as root: {missing}"
    assert machine.log("python")[-1] == "setup/kernels.py"


def test_elsewhere_with_everything_there_it_goes_on(machine: Machine) -> None:
    machine.system("fedora", "41", "Fedora Linux 41")
    for name in ("gcc", "make", "ld", "depmod"):
        machine.program(name, ":")
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    assert "setup/kernels.py" not in machine.log("python")


def test_kernels_that_cannot_be_had_fail_it(machine: Machine) -> None:
    python = machine.checkout / ".venv" / "bin" / "python"
    python.write_text('#!/bin/bash\nif [ "$1" = setup/kernels.py ]; then exit 69; fi\n')
    assert machine.set_up().returncode == 69


def test_debian_13_names_its_libraries_otherwise_and_has_a_qemu_that_will_do(machine: Machine) -> None:
    machine.system("debian", "13", "Debian GNU/Linux 13 (trixie)")
    machine.without("qemu-system-x86_64")
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    wanted = "libelf1t64 libssl3t64 qemu-system-x86"
    assert done.stderr.splitlines()[0] == f"setup: about to install, with apt-get as root: {wanted}"
    assert [line.rpartition("--no-install-recommends ")[2] for line in machine.log("root")][1:] == [wanted]
    assert "backports" not in done.stderr


def test_a_changed_pin_is_installed(machine: Machine) -> None:
    machine.set_up()
    with (machine.checkout / "pyproject.toml").open("a") as file:
        file.write("# another pin\n")
    (machine.where / "python.log").unlink()
    done = machine.set_up()
    assert "about to install, with pip into .venv" in done.stderr
    assert any("pip install" in line and "--constraint" in line for line in machine.log("python"))


@pytest.mark.lab
def test_repeating_it_for_real_installs_nothing() -> None:
    if not (ROOT / ".venv" / ".setup" / "venv").exists():
        pytest.skip("this checkout was not set up by the script")
    done = subprocess.run(
        [ROOT / "setup" / "setup.sh"],
        env={key: value for key, value in os.environ.items() if key != "SEVCHAOS_CACHE"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "about to install" not in done.stderr
    assert "fetching" not in done.stderr
