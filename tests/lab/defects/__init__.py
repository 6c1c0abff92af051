# SPDX-License-Identifier: Apache-2.0
"""Defects that are planted in a stock kernel by a module of their own, each for a way in which a green was not earned.

`tests/lab/programs/planted_defect` has the module and the fault that brings it into the lab, `tests/lab/planted` the
smallest experiments. A file here is of one defect and says which promise it must be found to break.
"""
