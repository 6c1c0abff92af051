# SPDX-License-Identifier: Apache-2.0
"""A migration: what a VMM upgrade does, phase by phase.

    phase       source                destination
    connect     connect  ◀──────────▶ listen, accept   over TCP, from one network namespace to the other
    pause       pause
    send-state  get_state ──────────▶ receive_state    plain SEV only; after the move the source answers EIO
    send-fd     send_fd   ──────────▶                  over a Unix socket
    move                              move             the one ioctl
    load-state                        set_state
    resume                            run
    commit                ◀────────── commit           the guest is mine and runs
    confirm     confirm   ──────────▶ confirm          I know
    abort       run                                    instead, when a phase up to the move has failed

The runner gives the orders, as a management layer does, and each operation is recorded by itself; so "before phase X"
is a place in the history. The two VMMs talk to each other (`chaos.vmm.peer`), and each wait has a deadline.

The state is received and checked before the move is made, because of where a failure leaves the guest:

    up to the move      at the source: both let go of each other, the source is put back into its guest. A source that
                        has died by then has lost it, unless its descriptor is with the destination already: what is
                        in the kernel lives as long as somebody holds it, and the move is made
    after the move      at the destination, or lost. The source is dead, and there is no way back. If the source's VMM
                        dies, the destination goes on without its confirmation

The source's descriptors stay open for asking. A phase that has no meaning for a guest is left out: a SEV-ES guest's
registers move by themselves, a guest that does not run needs no pause and no resume.

    handover    one attempt
    supervisor  what is done when one fails
"""
