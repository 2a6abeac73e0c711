# The everyday commands. `make help` lists them.
PYTHON  ?= python3
VENV    ?= .venv
JOBS    ?= 2
PYTEST_FLAGS ?=
BIN     := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST  := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-fast format test-browser lint bench bench-peers chaos topology tasks docs demo-model constraints clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## create the environment in .venv with the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## run the demo sweep on this machine's CPU and print its table
	$(BIN)/harness run demo
	@$(BIN)/harness table demo

test: install  ## the whole test suite in JOBS processes (2); needs no network and no GPU
	$(PYTEST) $(PYTEST_FLAGS)

test-fast: install  ## the tests for every edit: no Ray, no cluster, no killed processes, nothing marked slow
	$(PYTEST) -m 'not slow' $(PYTEST_FLAGS)

format: install  ## format the code and sort its imports
	$(BIN)/ruff check --select I --fix --quiet harness tests
	$(BIN)/ruff format harness tests

test-browser: install  ## the tests of the report page in a headless Chromium, which must be installed and not be starved
	HARNESS_BROWSER_TESTS=1 $(BIN)/python -m pytest tests/reporting/test_report.py

lint: install  ## ruff (rules and format) and mypy
	$(BIN)/ruff check harness tests
	$(BIN)/ruff format --check harness tests
	$(BIN)/mypy

bench: install  ## benchmarks of speed and memory, each figure beside its reference
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

bench-peers: install  ## the same cells by other tools, in environments of their own, beside ours
	$(BIN)/python tests/benchmarks/peers/compare.py

chaos: install  ## kill what a sweep depends on a hundred times and compare the tables (an hour; options in CHAOS=)
	$(BIN)/python tests/chaos/chaos.py --kills 100 $(CHAOS)

topology: install  ## test a cluster in network namespaces: access, lost nodes, recovery (root, Linux, ten minutes)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement docker/constraints-mlflow.txt --requirement tests/topology/requirements.txt
	$(BIN)/python tests/topology/topology.py

tasks: install  ## ten tasks with the commands that README shows, timed on a fresh clone (20 minutes; options in TASKS=)
	$(BIN)/python tests/newcomer/ten_tasks.py $(TASKS)

docs: install  ## the documentation as a site in site/, with the reference of the Python API; links are checked
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

demo-model: install  ## train the embedded demo model from its recipe (three to four minutes on one core)
	$(BIN)/python -m harness.data.demo.train

constraints: install  ## write the versions of this environment to constraints.txt
	@(head -1 constraints.txt; $(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//') > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove the environment and caches; keeps runs/ and mlflow.db
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache *.egg-info
