# SPDX-License-Identifier: Apache-2.0
"""The software PSP: SEV firmware behind the real mailbox, so that the kernel's own driver has somebody to talk to.

    numbers              ids, status codes, states, registers            (imports nothing of ours)
    buffers, memory      what a command points at, and where it is
    state, firmware      what the firmware remembers, and its rules      (pure, as are the next two lines)
    certs, sessions, curve      certificates, channels and keys; `cryptography` only when one is needed
    platform_, guest_, transport_commands, model      the commands, and the table of them
    plan, failpoints     failures on purpose, and how they are written down
    mailbox              the registers, with the firmware and the plan behind them
    ivshmem, wire, process      the process: QEMU's side, the controller's side, its life
    client               the controller's side of that, for asyncio

The command set is that of API 0.24, the last before SNP. Order of checks and status codes are those of AMD's own
firmware where it is public (`amd/AMD-ASPFW`), so that a doubly wrong request gets the answer a machine would give.

What differs from a real one, and would be seen by somebody who looks:

* Nothing is encrypted. LAUNCH_UPDATE_* measures memory and leaves it as it is, DBG_* copies, and a VMSA gets no
  checksum. What goes through a channel (sessions, secrets, SEND and RECEIVE) is encrypted and checked for real.
* WBINVD cannot be seen. DF_FLUSH takes it as done, unless --watch-wbinvd makes it wait for word of it.
* The chip's endorsement key is signed by nobody, so that a chain of certificates ends there, and a guest whose policy
  asks for an AMD platform (bit SEV) cannot be sent. Every DOWNLOAD_FIRMWARE is refused with BAD_SIGNATURE.
* A used ASID needs a DF_FLUSH whether or not its guest ever ran; newer firmware is milder (--forgive-unrun).
* COPY, ACTIVATE_EX, SWAP_OUT, SWAP_IN and RING_BUFFER, which Linux does not use, are UNSUPPORTED.
* All randomness comes from a seed: the same lab makes the same keys, certificates and nonces every time.
"""
