# SPDX-License-Identifier: Apache-2.0
"""Runs in the lab: moves a VM away that has a device, and prints what is answered on its descriptors then, as JSON.

The device is KVM_DEV_TYPE_VFIO, which any VM may have. It stands for those that have descriptors of their own.
"""

from __future__ import annotations

import ctypes
import errno
import json

from chaos.kvm.call import attempt
from chaos.kvm.numbers import Ioctl
from chaos.kvm.sev import Platform, Sev
from chaos.kvm.structs import EncRegion
from chaos.kvm.system import System

KVM_CREATE_DEVICE = 0xC00CAEE0
KVM_HAS_DEVICE_ATTR = 0x4018AEE3
KVM_DEV_TYPE_VFIO = 4
Words = ctypes.c_uint32 * 3  # struct kvm_create_device: type, fd, flags
Attribute = ctypes.c_uint64 * 3  # struct kvm_device_attr: flags and group, attr, addr; a group that there is not


def main() -> None:
    system, platform = System.open(), Platform.open()
    source, destination = system.create_vm(), system.create_vm()
    Sev(source.fd.number, platform.fd.number).init()
    asked = Words(KVM_DEV_TYPE_VFIO, 0, 0)
    _, failed = attempt(source.fd.number, KVM_CREATE_DEVICE, ctypes.byref(asked))
    assert not failed, errno.errorcode[failed]
    told = {}
    for moved in ("before", "after"):
        if moved == "after":
            destination.move_context_from(source.fd.number)
        _, device = attempt(asked[1], KVM_HAS_DEVICE_ATTR, ctypes.byref(Attribute(0xFF << 32, 0, 0)))
        region = EncRegion(addr=0, size=0)
        _, registered = attempt(source.fd.number, Ioctl.KVM_MEMORY_ENCRYPT_REG_REGION, ctypes.byref(region))
        told[moved] = {"device": errno.errorcode.get(device, ""), "region": errno.errorcode.get(registered, "")}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
