# SPDX-License-Identifier: Apache-2.0
#
# make demo    everything needed is installed, then real experiments run on two stock kernels in the lab
# make test    everything needed is installed, then all checks and tests, the lab's included
# make check   the checks and the tests that need no lab
# make bench   figures, side by side with what they are compared with; takes minutes
# make wheel   dist/sevchaos-*.whl

bin := .venv/bin
demo_kernels := --kernel debian:6.1 --kernel debian:6.12
parallel := --numprocesses auto --maxprocesses 4 --dist loadfile
demo_experiments := move-across-cgroups move-across-cgroups-es kill-destination-in-move kill-source-in-move

.PHONY: demo test check lint setup bench wheel clean

demo: setup
	$(bin)/sevchaos run --accept-known $(demo_kernels) $(demo_experiments)

test: lint
	$(bin)/pytest $(parallel) -m "not alone"
	$(bin)/pytest -m alone

check: lint
	$(bin)/pytest $(parallel) -m "not lab"

lint: setup
	$(bin)/ruff check
	$(bin)/mypy
	$(bin)/lint-imports

setup:
	@setup/setup.sh

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
