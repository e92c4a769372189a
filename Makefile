# `make demo` and `make test` need Python 3.11 or later and make; everything else is installed into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO_ARGS ?=
BENCH_ARGS ?=
STRESS_ARGS ?=
# One more than there are cores, because many tests wait for processes that they start.
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
NEWEST := .venv-newest
NEWEST_TESTS := package x_locator snapshot_dataset h5ad scvi_models scvi_training
# What starts processes, compiles, loads what takes seconds to load, or tries very many cases; in any folder.
SLOW_TESTS := agreement auto benchmarks budget classifier cli claim compressed context creation \
  data_module dataloader dataset demo distributed docs epoch_counter epoch_plan h5ad held_rows iterations \
  jit kernels lightning log maker mapped memory_dataset memory_source mini_batch_iterable mixing notebooks package progress \
  ranks ray_cluster ray_train read_size reading realdata resume s3 scopes scvi scvi_models scvi_realdata \
  scvi_training shared_array shared_ids shuffle_modes shuffle_viz snapshot snapshot_build snapshot_dataset \
  snapshot_source snapshot_source_segment soma_source source_dataset sources streaming tables takeover \
  task threads torchrun x_locator
SLOW_TEST := tests/test_golden_orders.py::test_a_dataloader_with_workers_yields_the_rows_of_an_experiment_in_the_order_of_0_1_0
TORCH  := $(shell grep '^torch==' constraints.txt)
PAGE   := shuffle_viz
HAS_NODE := node -e 'const [a, b] = process.versions.node.split("."); process.exit(+(a * 100 + +b < 2019))' 2>/dev/null

.PHONY: help demo test test-fast stress compat-newest bench viz docs lint format clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

demo: $(VENV)/demo.installed  ## Simulate an experiment and train on it; DEMO_ARGS="--h5ad FILE" for your own
	$(BIN)/tiledbsoma-ml demo $(DEMO_ARGS)

test: $(VENV)/test.installed $(PAGE)/node_modules/.package-lock.json  ## Run the whole test suite
	$(BIN)/pytest -m "not ray" --numprocesses $(WORKERS) --dist worksteal
	$(BIN)/pytest -m ray tests/test_ray_train.py  # a cluster of processes: nothing else beside it

test-fast: $(VENV)/test.installed  ## Run the tests that are quick, while you work: below two minutes on two cores
	$(BIN)/pytest --numprocesses auto --dist worksteal --deselect $(SLOW_TEST) $(SLOW_TESTS:%=--ignore-glob='*/test_%.py')

stress: $(VENV)/test.installed  ## Read obs beside busy loops: no process may die; STRESS_ARGS="--minutes 60"
	$(BIN)/python tests/stress_obs.py $(STRESS_ARGS)

compat-newest:  ## Install the newest version of everything but torch, and try it
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check '$(TORCH)' '.[test]'
	$(NEWEST)/bin/pip list --disable-pip-version-check
	$(NEWEST)/bin/tiledbsoma-ml demo --cells 300 --genes 50 --epochs 2 --output-dir $(NEWEST)/demo_output
	$(NEWEST)/bin/pytest -q -W default --numprocesses auto --dist worksteal \
	  $(foreach name,$(NEWEST_TESTS),$(wildcard tests/test_$(name).py tests/*/test_$(name).py))

bench: $(VENV)/test.installed  ## Measure speed and memory; BENCH_ARGS="--quick" for two minutes
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

viz: $(PAGE)/node_modules/.package-lock.json  ## Build the page that shows how rows are shuffled: shuffle_viz/dist
	@$(HAS_NODE) || { echo "make viz needs Node.js 20.19 or later"; exit 1; }
	cd $(PAGE) && npm run build

docs: $(VENV)/docs.installed $(PAGE)/node_modules/.package-lock.json  ## Build the documentation into docs/_build/html
	@if $(HAS_NODE); then cd $(PAGE) && npm run build; fi
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
	rm -rf $(PAGE)/node_modules $(PAGE)/dist $(PAGE)/test-results
	rm -rf $(VENV) $(NEWEST) demo_output lightning_logs scvi_log docs/_build docs/_generated docs/notebooks build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

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
	$(PIP) --editable '.[test]' --group lint --group docs
	@touch $@

# npm writes this file last. Without Node.js the tests of the page are skipped.
$(PAGE)/node_modules/.package-lock.json: $(PAGE)/package-lock.json
	@if $(HAS_NODE); then \
	  cd $(PAGE) && PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD=1 npm ci --prefer-offline --no-audit --no-fund && touch node_modules/.package-lock.json; \
	else echo "Node.js 20.19 or later is not installed: the page is neither built nor tested"; fi

$(VENV)/docs.installed: $(VENV)/pip.installed pyproject.toml
	$(PIP) --editable '.[cli]' --group docs
	@touch $@
