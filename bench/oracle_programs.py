# SPDX-License-Identifier: Apache-2.0
"""The oracle against itself: random programs of 50 operations, every state held against part 0 of the contract.

python -m bench.oracle_programs [programs] [seed]
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter

from chaos.judge import oracle
from chaos.judge.oracle.programs import WIDTH, run, violations

OPERATIONS = 50
KERNELS = ("6.1.192", "6.12.117")


def main(programs: int = 10_000, seed: int = 1) -> int:
    chance = random.Random(seed)
    states = [oracle.new(kernel, {"sev": 4, "sev_es": 3}, {"sev": 1}) for kernel in KERNELS]
    answers: Counter[tuple[str, int]] = Counter()
    wrong = steps = 0
    began, worked = time.perf_counter(), time.process_time()
    for number in range(programs):
        for step in run(states[number % len(states)], chance.randbytes(WIDTH * OPERATIONS)):
            steps += 1
            if step.answer is not None:
                answers[step.operation.f, step.answer.errno] += 1
            for violation in violations(step):
                wrong += 1
                print(f"program {number}, {step.operation.f}: {violation}")
    elapsed, worked = time.perf_counter() - began, time.process_time() - worked
    print(f"{programs} programs of {OPERATIONS} operations, {steps} of them made, seed {seed}")
    print(f"{elapsed:.1f} s, {worked:.1f} of them at work")
    print(f"{programs / elapsed:.0f} programs a second, {steps / elapsed:.0f} operations a second")
    print(f"{wrong} violations")
    for (f, errno), count in sorted(answers.items()):
        print(f"  {f:20} {errno:4} {count:8}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*(int(argument) for argument in sys.argv[1:])))
