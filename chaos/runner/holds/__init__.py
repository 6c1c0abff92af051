# SPDX-License-Identifier: Apache-2.0
"""Who runs when: holds that stop an operation at a known place."""
