# `make run` measures and reports; `make test` tests the core of each thing once, `make test-all` all that needs no GPU,
# `make gpu` all that does. All make .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-all lint gpu clean

run: $(VENV)/run.stamp
	@status=0; $(BIN)/attnbench run --plugins all --seq 512..16384 || status=$$?; \
	$(BIN)/attnbench report; exit $$status

# A file to a process, as fixtures of a file measure for many tests; no more processes than share the memory of a laptop.
# In the order of names, which puts the long files first: by the number of tests a file of a few long ones would be the last.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/dev.stamp
	$(PYTEST)

test-all: $(VENV)/dev.stamp
	$(PYTEST) -m "not gpu"

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

gpu: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnbench needs Python 3.11 or later; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/run.stamp
