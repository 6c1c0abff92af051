# SPDX-License-Identifier: Apache-2.0
"""Network namespaces, the links between them, and what goes wrong on those links, on top of pyroute2.

A namespace here has no name. It is held by a file descriptor and by the processes that live in it, and when the last
of these is gone the kernel takes it away with its links, its addresses and its qdiscs. Nothing is mounted under
/run/netns, so a controller that is killed at any moment leaves nothing behind, and there is nothing to clean.

    space     a namespace: made, entered, given up
    netlink   pyroute2 inside a namespace, with a deadline and with errors of ours
    link      veth pairs between namespaces, addresses, up and down, what is there
    netem     delay, loss and the like on a link, and the kernel's own counters as evidence
    qdisc     the messages for it
    tun       a device beside a link, whose packets a process of ours reads and writes
    lane      what a relay (`chaos.netns.relay`) does to them, where the kernel has no netem
    pair      two namespaces joined by a link, made and given up as one

What is refused is an OSError with the kernel's errno, `HostLacks` where root or a part of the kernel is missing. A wait
that passes its deadline is a TimeoutError (which is an OSError, ETIMEDOUT), at the end of an undo `CleanupFailed`.

pyroute2 takes a while to import (a sixth of a second here, a whole one under emulation), so it is imported where it is
used and not before; entering a namespace does not need it.
"""
