# SPDX-License-Identifier: Apache-2.0
"""What happened in a run: its records, and the file that they are kept in."""
