# SPDX-License-Identifier: Apache-2.0
"""Runs inside the lab: what there is of each kind of thing that a dead run could leave, and what was not there before.

python3 -m tests.lab.programs.leaks plant                 one leak of each kind, and whether the audit sees it
python3 -m tests.lab.programs.leaks kill --runs N --kills K --seed S NAME…
                                                          runs with --host local, K of them killed in their middle
"""
