# The everyday commands. `make help` lists them.
PYTHON  ?= python3
VENV    ?= .venv
JOBS    ?= 2
BIN     := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test lint bench chaos topology demo-model constraints clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## make the environment in .venv with the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## run the demo sweep on this machine's CPU, print its table, say how to open the dashboard
	$(BIN)/harness run demo
	@$(BIN)/harness table demo

test: install  ## the whole test suite in JOBS processes (2); needs no network and no GPU
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

lint: install  ## ruff and mypy
	$(BIN)/ruff check harness tests
	$(BIN)/mypy

bench: install  ## speed and memory, each figure beside its reference in one run
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

chaos: install  ## kill whatever a sweep depends on a hundred times; the tables must stay the same (an hour; CHAOS= for its options)
	$(BIN)/python tests/chaos/chaos.py --kills 100 $(CHAOS)

topology: install  ## a cluster in network namespaces, with MLflow on PostgreSQL: doors, loss and return (root, Linux, ten minutes)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement docker/constraints-mlflow.txt --requirement tests/topology/requirements.txt
	$(BIN)/python tests/topology/topology.py

demo-model: install  ## train the embedded demo model again from its committed recipe (three to four minutes on one core)
	$(BIN)/python -m harness.data.demo.train

constraints: install  ## write the versions of the present environment to constraints.txt
	@(head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//') > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove the environment and caches; keeps runs/ and mlflow.db
	rm -rf $(VENV) .mypy_cache .ruff_cache *.egg-info
