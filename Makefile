# Each target does its own set-up in $(VENV); a machine needs Python >= 3.10 and make, nothing else.
#   make demo     a teacher teaches a student on drawn digits, side by side with the plain student
#   make test     the test suite              make lint   style, types and the order of imports
#   make test-long   what takes minutes: every family learns eight photographs, every family teaches every other
#   make bench    the benchmarks, small       make docs   links, commands and keys in the documentation
#   make fuzz     600 mutations of what a user can give: no traceback, no hang, nothing wrong in silence
#   make paper-mini  the paper's tables on small sets: hours; stopped, it goes on where it was

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(EXTRAS)

.PHONY: setup demo test test-long lint format bench fuzz docs paper-mini clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "detdistill needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: setup
	$(BIN)/detdistill demo

# Tests run in $(WORKERS) processes of one thread each, which is quicker than many threads on small tensors.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not long" $(PYTEST_FLAGS)
	@echo "left out: the tests marked long, of every family and every pair of them (make test-long)"

test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m long $(PYTEST_FLAGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/step_cost.py --size 128 128 --rounds 3
	$(BIN)/python benchmarks/evaluator.py --images 300

# Mutated recipes, data, weights, run folders and arguments: counts tracebacks, hangs and silent acceptances.
fuzz: setup
	$(BIN)/python benchmarks/fuzz.py $(FLAGS)

# What it needs and how it takes parts: benchmarks/paper_mini.py.
paper-mini: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/paper_mini.py --jobs 2 $(FLAGS)

docs: setup
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
