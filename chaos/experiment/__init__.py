# SPDX-License-Identifier: Apache-2.0
"""What is to be done: the model of an experiment, its steps, and the files that it is read from."""
