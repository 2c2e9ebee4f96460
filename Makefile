# `make` alone lists what can be done. PYTHON=/path/to/python3.13 chooses the interpreter.

MAKEFLAGS += --no-builtin-rules
SHELL := /bin/bash
.DEFAULT_GOAL := help

ifdef PYTHON
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
else
VENV := .venv
endif
RUN := $(VENV)/bin/python

.PHONY: help test lint demo bench simulation chaos clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

test: $(VENV)/.for-test  ## set up .venv and run all tests (ARGS="tests/unit -k name" for some)
	$(RUN) -m pytest $(ARGS)

lint: $(VENV)/.for-lint  ## ruff and mypy --strict
	$(RUN) -m ruff check .
	$(RUN) -m mypy

demo: $(VENV)/.for-run  ## two agents on this machine count the identifiers of the standard library
	$(RUN) examples/demo.py

bench: $(VENV)/.for-bench  ## compare with ProcessPoolExecutor and others: table, JSON and plot in build/benchmarks
	$(RUN) -m benchmarks $(ARGS)

simulation: $(VENV)/.for-test  ## a long run of the scheduler's simulation, with fresh seeds
	$(RUN) -m tests.simulation $(ARGS)

chaos: $(VENV)/.for-test  ## storms of faults on several namespaces, as root (MINUTES=60 SEED=1; default: 10, any)
	$(RUN) -m tests.chaos --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED)) $(ARGS)

clean:  ## remove what these targets made
	rm -rf .venv .venv-* build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@set -e; for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    if $$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "$(VENV): made from $$($$python -V)"; exec $$python -m venv $(VENV); fi; done; \
	echo "No Python 3.11 or newer with venv found; name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1

PIP_INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check

$(VENV)/.for-run: $(VENV)/bin/python setup.cfg pyproject.toml
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.for-%: $(VENV)/bin/python setup.cfg pyproject.toml
	$(PIP_INSTALL) --editable '.[$*]'
	@touch $@
