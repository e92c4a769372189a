# `make demo` and `make test` need Python 3.11 or later and make; everything else is installed into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO_ARGS ?=
BENCH_ARGS ?=

.PHONY: help demo test bench docs lint format clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

demo: $(VENV)/demo.installed  ## Simulate an experiment and train on it; DEMO_ARGS="--h5ad FILE" for your own
	$(BIN)/tiledbsoma-ml demo $(DEMO_ARGS)

test: $(VENV)/test.installed  ## Run the whole test suite
	$(BIN)/pytest --numprocesses auto --dist worksteal

bench: $(VENV)/test.installed  ## Measure speed and memory; BENCH_ARGS="--quick" for two minutes
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

docs: $(VENV)/docs.installed  ## Build the documentation into docs/_build/html
	$(BIN)/sphinx-build -n -W --keep-going -b html docs docs/_build/html

lint: $(VENV)/test.installed  ## Run every linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(VENV)/test.installed  ## Mend what the linters can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what the other targets made
	rm -rf $(VENV) demo_output docs/_build docs/_generated docs/notebooks build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A stamp file says that its set of packages is installed; editing either list installs again.
$(VENV)/pip.installed: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip
	@touch $@

$(VENV)/demo.installed: $(VENV)/pip.installed pyproject.toml
	$(PIP) --editable '.[cli]'
	@touch $@

$(VENV)/test.installed: $(VENV)/pip.installed pyproject.toml
	$(PIP) --editable '.[test]' --group lint
	@touch $@

$(VENV)/docs.installed: $(VENV)/pip.installed pyproject.toml
	$(PIP) --editable '.[cli]' --group docs
	@touch $@
