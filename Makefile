# SPDX-License-Identifier: Apache-2.0
#
# make demo    everything needed is installed, then real experiments run on two stock kernels in the lab
# make test    everything needed is installed, then all checks and tests, the lab's included
# make check   the checks and the tests that need no lab
# make nightly the whole catalogue on each kernel against its table of outcomes (docs/outcomes.md), planted defects, a
#              minute of patched jump labels, and mutants of the judge (docs/mutation.md); a part that passed is not
#              repeated, `make nightly again=--again` repeats all
# make outcomes  the tables of outcomes, made anew; `git diff experiments/outcomes` shows what changed
# make bench   figures, side by side with what they are compared with; takes minutes
# make wheel   dist/sevchaos-*.whl

bin := .venv/bin
kernels := debian:6.12 debian:7.3
each_kernel = $(foreach kernel,$(kernels),--kernel $(kernel))
# In the order of the names: the lab's files are long and come before the unit tests, which then fill what is left.
parallel := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
demo_experiments := move-across-cgroups move-across-cgroups-es kill-destination-in-move kill-source-in-move

.PHONY: demo test check lint setup nightly outcomes bench wheel clean

demo: setup
	$(bin)/sevchaos run --accept-known $(each_kernel) $(demo_experiments)

test: lint
	$(bin)/pytest $(parallel) --durations 12 -m "not alone and not nightly"
	$(bin)/pytest -m "alone and not nightly"

check: lint
	$(bin)/pytest $(parallel) -m "not lab and not nightly"

lint: setup
	$(bin)/ruff check
	$(bin)/mypy
	$(bin)/lint-imports

setup:
	@setup/setup.sh

nightly outcomes: kernels := debian:6.1 $(kernels)

nightly: setup
	$(bin)/pip install --quiet --requirement tests/nightly/requirements.txt
	$(bin)/python -m tests.nightly run $(again) $(each_kernel)

outcomes: setup
	$(bin)/python -m tests.nightly outcomes $(kernels)

bench: setup
	$(bin)/pip install --quiet --requirement bench/requirements.txt
	$(bin)/python bench/lab_start.py
	$(bin)/sevchaos lab run --copy bench/psp_round_trip.py -- python3 psp_round_trip.py
	$(bin)/python bench/moves.py
	$(bin)/python bench/holds.py
	$(bin)/python bench/storm_moves.py --moves 100
	$(bin)/sevchaos run move-four-vcpus --repeat 200 --accept-known --quiet --runs runs/downtime > /dev/null
	$(bin)/python bench/downtime.py runs/downtime
	$(bin)/python bench/oracle_programs.py

wheel: setup
	$(bin)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
