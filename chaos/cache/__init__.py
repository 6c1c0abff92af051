# SPDX-License-Identifier: Apache-2.0
"""The build cache, and the tools that fill it."""
