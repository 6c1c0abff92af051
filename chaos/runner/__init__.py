# SPDX-License-Identifier: Apache-2.0
"""The program on the host: it carries out an experiment and writes the history."""
