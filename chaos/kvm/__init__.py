# SPDX-License-Identifier: Apache-2.0
"""The kernel's virtualisation interface and nothing else.

    system.System  /dev/kvm            vcpu.Vcpu       a vCPU and its shared kvm_run page
    vm.Vm          a virtual machine   sev.Sev         the encryption context of a VM, KVM_MEMORY_ENCRYPT_OP
                                       sev.Platform    /dev/sev

Every call goes through `call.ioctl`, which measures the time around the system call itself and raises `KernelError`.
Nothing here decides anything: an object is a file descriptor with names for what can be asked of it. Descriptors have
one owner (`fd.OwnedFd`), and nothing is closed behind one's back: when a VM's last descriptor goes, an ASID goes with
it, so the moment has to be chosen.
"""
