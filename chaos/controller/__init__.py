# SPDX-License-Identifier: Apache-2.0
"""A run seen from outside: hosts, what is said to a runner, campaigns, run directories."""
