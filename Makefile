# Everything runs from .venv, which the first target that needs it sets up: nothing has to be activated or installed
# first, except Python 3.11 or newer.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-fast lint types format protos protos-accept bench bench-peers pieces pieces-baseline counts counts-accept lock clean

# The first Python on the path that is new enough; `make PYTHON=/path/to/python3 ...` names another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INSTALL := $(PIP) install --require-hashes --no-build-isolation
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--custom-compile-command "make lock"
# More arguments for the program that a target runs: `make test ARGS="-k codec"`.
ARGS ?=

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: .venv/.dev  ## Set up .venv with everything, pinned (the other targets do it themselves)

demo: .venv/.run  ## Load a year of real flights, serve them, ask for features, and stop
	@$(BIN)/python -m examples.flights.demo $(ARGS)

serve: .venv/.run  ## Leave the example's server running
	@$(BIN)/python -m examples.flights.serve $(ARGS)

test: .venv/.dev  ## Install what the tests need, then run all of them
	@tests/setup.sh
	@$(BIN)/python -m pytest $(ARGS)

test-fast: .venv/.dev  ## Run the tests that take seconds
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

lint: .venv/.dev  ## Check style, and that the wire contract is sound, compatible, and what the code was generated from
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/buf lint protos
	@$(BIN)/buf format protos --diff --exit-code
	@$(BIN)/python protos/generate.py --check

types: .venv/.dev  ## Check the types
	@$(BIN)/mypy $(ARGS)

format: .venv/.dev  ## Format the code and the protos
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/buf format protos --write

protos: .venv/.dev  ## Generate featserve/_proto from protos/; refuses a change that breaks clients
	@$(BIN)/python protos/generate.py

protos-accept: .venv/.dev  ## The same, and let a breaking change pass (only for what was never released)
	@$(BIN)/python protos/generate.py --accept-breaking

bench: .venv/.dev  ## Measure, and print what was measured
	@$(BIN)/python -m bench $(ARGS)

bench-peers: .venv/.dev  ## Measure featserve beside Feast and Redis, for a quarter of an hour (ARGS=--brief: some minutes)
	@$(BIN)/python -m bench.peers $(ARGS)

# That the baseline is another machine's is a warning of pytest-benchmark's, and no error as other warnings are.
PIECES := $(BIN)/python -m pytest -q bench/pieces -W default::pytest_benchmark.logger.PytestBenchmarkWarning \
	--benchmark-disable-gc --benchmark-storage=file://bench/pieces/baseline

pieces: .venv/.dev  ## Time the pieces of a request beside the baseline's times; informs only, what fails is `make counts`
	@$(PIECES) --benchmark-compare --benchmark-group-by=fullname --benchmark-columns=median,min --benchmark-sort=name $(ARGS)

pieces-baseline: .venv/.dev  ## Make the times of this machine what `make pieces` compares with
	@rm -rf bench/pieces/baseline
	@$(PIECES) --benchmark-quiet --benchmark-save=baseline $(ARGS)

counts: .venv/.dev  ## Count a request's instructions and allocations; fails where they rose (ARGS=--may-skip: not on other Pythons)
	@$(BIN)/python -m bench.counts $(ARGS)

counts-accept: .venv/.dev  ## Make what is counted now what `make counts` compares with
	@$(BIN)/python -m bench.counts --accept

lock: .venv/.dev  ## Pin the newest versions that pyproject.toml and requirements/ allow, and the hashes of their files
	@$(COMPILE) --upgrade --all-extras --output-file requirements.lock pyproject.toml requirements/*.in
	@$(COMPILE) --constraint requirements.lock --extra train --no-annotate --output-file requirements/run.lock \
		pyproject.toml requirements/examples.in requirements/build.in

clean:  ## Remove everything that can be made again, .venv included
	@rm -rf .venv .peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -prune -exec rm -rf {} +

# What the example runs with: the server, training, and the flights (run.lock), and what the rest needs beside that
# (requirements.lock). A file whose hash is not in the lock is refused. Packages that come as source are built with the
# pinned setuptools, so nothing unpinned is fetched.
.venv/.run: requirements/run.lock pyproject.toml
	@[[ -n "$(PYTHON)" ]] || { echo "featserve needs Python 3.11 or newer, and there is none on the path"; exit 1; }
	@echo "Setting up .venv (about a minute)..."
	@$(PYTHON) -m venv .venv
	@$(INSTALL) -r <(sed -n '/^setuptools==/,/[^\]$$/p' requirements/run.lock)
	@$(INSTALL) -r requirements/run.lock
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

.venv/.dev: .venv/.run requirements.lock
	@echo "Adding what tests and checks need to .venv (one or two minutes, most of it Spark)..."
	@$(INSTALL) -r requirements.lock
	@touch $@
