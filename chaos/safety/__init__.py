# SPDX-License-Identifier: Apache-2.0
"""The host is left as it was: what is there before a run, what a run claims, who removes it."""
