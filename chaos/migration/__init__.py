# SPDX-License-Identifier: Apache-2.0
"""The hand-over protocol around a move."""
