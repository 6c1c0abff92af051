# SPDX-License-Identifier: Apache-2.0
"""What a kernel's configuration must have for the lab, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chaos.errors import NoKernel

# option, values that will do, what it is for
_REQUIRED = (
    ("MODULES", "y", "the lab's shim is a module"),
    ("KVM_AMD", "m", "the code under test; a module, because the shim must be there before it"),
    ("KVM_AMD_SEV", "y", "SEV in KVM, the code under test"),
    ("CRYPTO_DEV_CCP_DD", "m", "the PSP's driver; a module, because the shim must be there before it"),
    ("CRYPTO_DEV_SP_PSP", "y", "the PSP's driver speaks to the SEV firmware"),
    ("CGROUP_MISC", "y", "the misc controller, which ASIDs are charged to"),
    ("PARAVIRT_XXL", "y", "the shim answers CPUID leaf 0x8000001F through pv_ops (select XEN_PV to get it)"),
    ("KPROBES", "y", "faults and holds inside the kernel"),
    ("PCI_MSI", "y", "interrupts of the software PSP"),
    ("VIRTIO_PCI", "my", "the channel to the lab"),
    ("VIRTIO_CONSOLE", "my", "the channel to the lab"),
    ("SERIAL_8250_CONSOLE", "y", "the console, which shows a panic"),
    ("BLK_DEV_INITRD", "y", "the lab's root file system"),
    ("DEVTMPFS", "y", "/dev in the lab"),
    ("TMPFS", "y", "files in the lab"),
    ("USERFAULTFD", "y", "holds inside SEV commands"),
)
# Must not be set, and why.
_FORBIDDEN = (("MODULE_SIG_FORCE", "y", "the lab's modules are not signed"),)

_MISSING_FILE = "the lab needs a kernel's configuration to know whether it fits"


@dataclass(frozen=True, slots=True)
class Lacking:
    option: str
    wanted: str
    found: str
    purpose: str

    def __str__(self) -> str:
        return f"{self.option}={self.wanted} (it has {self.found}): {self.purpose}"


def read_config(path: Path) -> dict[str, str]:
    """Options without CONFIG_; what is not set is not there. Raises NoKernel when there is no such file."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise NoKernel(
            f"cannot read {path}: {error.strerror}; {_MISSING_FILE}",
            remedy="give the kernel's configuration the name above, or use another kernel",
        ) from error
    return dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE))


def full_version(path: Path) -> str | None:
    """x.y.z from the head of a configuration: "# Linux/x86 6.1.192 Kernel Configuration"."""
    with path.open(errors="replace") as file:
        head = file.read(400)
    found = re.search(r"^# Linux/x86(?:_64)? (\d+\.\d+\.\d+)\S* Kernel Configuration$", head, re.MULTILINE)
    return found[1] if found else None


def lacking(config: Mapping[str, str]) -> list[Lacking]:
    missing = [
        Lacking(f"CONFIG_{option}", " or ".join(wanted), config.get(option, "n"), purpose)
        for option, wanted, purpose in _REQUIRED
        if config.get(option, "n") not in wanted
    ]
    missing += [
        Lacking(f"CONFIG_{option}", "n", unwanted, purpose)
        for option, unwanted, purpose in _FORBIDDEN
        if config.get(option) == unwanted
    ]
    return missing


def memory_wanted(config: Mapping[str, str]) -> int:
    """Bytes that a lab of this kernel wants: KASAN takes an eighth for its shadow, and keeps what was freed."""
    return 2 << 30 if config.get("KASAN") == "y" else 1 << 30


def slowness(config: Mapping[str, str]) -> int:
    """How many times as long as on another kernel things take, at most, where every access to memory is looked at."""
    return 4 if "y" in (config.get("KASAN"), config.get("KCSAN")) else 1


def parameters_wanted(config: Mapping[str, str]) -> str:
    """For the command line of a lab of this kernel."""
    wanted = []
    if config.get("KASAN") == "y":  # it reports once a boot otherwise, and a lab has many runs
        wanted.append("kasan_multi_shot")
    if config.get("DEBUG_KMEMLEAK") == "y":
        # From 6.18 on each CPU has arrays of a cache's objects ("sheaves"). What was taken out of one still stands
        # there until it is filled again, and kmemleak takes that for a reference: of 300 objects lost on 7.3.4 it
        # found 260, of 5 none. Caches that are debugged have no sheaves; a red zone has them all debugged.
        wanted.append("slab_debug=Z")
    return " ".join(wanted)


def check_config(config: Mapping[str, str], kernel: str) -> None:
    """Raise NoKernel, naming every option that keeps this kernel from carrying the lab."""
    missing = lacking(config)
    if missing:
        raise NoKernel(
            f"{kernel} cannot carry the lab; its configuration needs\n" + "\n".join(f"  {m}" for m in missing),
            remedy="set these and rebuild, or use another kernel (Debian's have them all)",
        )
