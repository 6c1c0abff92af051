# SPDX-License-Identifier: Apache-2.0
"""Runs in the lab, as root: everything kfault promises, tried on its kernel. See `__main__`."""
