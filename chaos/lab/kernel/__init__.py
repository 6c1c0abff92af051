# SPDX-License-Identifier: Apache-2.0
"""Where the lab's kernels come from, and the modules built for them."""
