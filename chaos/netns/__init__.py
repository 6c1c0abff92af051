# SPDX-License-Identifier: Apache-2.0
"""Network namespaces, the links between them, and what goes wrong on those links, on top of pyroute2.

A namespace here has no name. It is held by a file descriptor and by the processes that live in it, and when the last
of these is gone the kernel takes it away with its links, its addresses and its qdiscs. Nothing is mounted under
/run/netns, so a controller that is killed at any moment leaves nothing behind, and there is nothing to clean.

pyroute2 takes a while to import (a sixth of a second here, a whole one under emulation), so it is imported where it is
used and not before.
"""
