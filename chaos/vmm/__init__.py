# SPDX-License-Identifier: Apache-2.0
"""VMM processes: who forks them, what is said to them, and what they do.

    runner ──── Spawn, Reap ───▶ server.ForkServer ──── fork ───▶ agent.Agent
       │                                                             ▲   │
       └──── Request, Begun, Reply over `seqpacket` ─────────────────┘   ├── vcpus.Team     a vCPU, on a native thread
                                                                         ├── storm          native threads of ioctls
                                                                         └── peer.Peer      the other end of a migration
                                                                             (state and the VM's descriptor)

The fork server is forked from the runner while that has one thread, so that an agent is a copy of a process with
nothing under way. An agent goes into its cgroup and its network namespace before it does anything else: what it takes
is charged there from the first. Agents die with the fork server and that with the runner, by PR_SET_PDEATHSIG and by
the end of their sockets.

What native threads see stands in memory files, which the runner makes and keeps a copy of: the last tick of a guest and
the answers of a storm are known also of a VMM that was killed.

Descriptors travel with SCM_RIGHTS and have one owner at a time (`seqpacket.FdSet`). A VM's descriptor goes straight
from one agent to the other: if the runner stood between, its copy would keep a VM alive that both had given up.
"""
