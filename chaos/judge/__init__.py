# SPDX-License-Identifier: Apache-2.0
"""What a history means: the verdict of every promise, from the records alone."""
