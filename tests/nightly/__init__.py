# SPDX-License-Identifier: Apache-2.0
"""What takes longer than CI has: the whole catalogue on each kernel, against the tables of outcomes (docs/outcomes.md).

python -m tests.nightly run          every part that was not done yet with this tree and these kernels
python -m tests.nightly mutation     mutants of the judge, and which of them no test kills (docs/mutation.md)
python -m tests.nightly outcomes     carry the catalogue out and write the table of each kernel
python -m tests.nightly write        the same from reports that are there, of `sevchaos check --json`
python -m tests.nightly compare      reports that are there, against the tables
"""
