# SPDX-License-Identifier: Apache-2.0
"""What any Linux has: descriptors, processes, locks, the kernel's log, symbols and tracer, threads in /proc."""
