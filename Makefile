# Two commands do all the set-up: make simulate, make test. See README.md.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell $(p) -c 'import sys; (3,11) <= sys.version_info < (3,13) and print("$(p)")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: simulate federation test test-quick check lint format bench bench-gpu mutants results lock clean

simulate: $(VENV)/.quickstart  ## install, then fine-tune across eight virtual hospital sites
	$(BIN)/fedtune-sim run configs/quickstart.yaml

federation: $(VENV)/.quickstart  ## a coordinator and three sites on this machine as real processes, with and without DP
	$(BIN)/python -m simulations.local_federation configs/quickstart.yaml --sites 3

test: $(VENV)/.dev  ## install, then run every test
	OMP_NUM_THREADS=1 $(PYTEST) tests

test-quick: $(VENV)/.dev  ## the tests that take seconds
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" tests

check: $(VENV)/.dev lint  ## what CI checks besides the tests
	$(BIN)/mypy

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## measure against a plain loop, Flower's simulation and the arithmetic limit; prints a table, writes bench.json
	$(BIN)/python -m simulations.benchmarks

bench-gpu: $(VENV)/.dev  ## the same on a GPU with a model of 1B's shape; without one it says so
	$(BIN)/python -m simulations.benchmarks.gpu

mutants: $(VENV)/.dev  ## plant nine privacy bugs, one at a time, and check that the tests catch each
	$(BIN)/python -m tests.mutants

results: $(VENV)/.dev  ## run the configs behind docs/results.md (hours on two cores) and write its tables
	$(BIN)/python -m simulations.results

lock: $(VENV)/.dev  ## write what is installed to constraints.txt
	{ head -1 constraints.txt; $(BIN)/pip list --format=freeze --exclude fedtune --exclude pip --exclude setuptools | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis bench.json

# torch first: plain pip takes a CPU build where one is to be had, so that no CUDA packages follow.
$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; expected one on PATH. Set PYTHON=/path/to/python3.11."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.quickstart: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[quickstart]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps flwr-datasets==0.6.1 seaborn==0.13.2  # it asks for datasets below 5 and works with 5.2
	touch $@ $(VENV)/.quickstart
