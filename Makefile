# One virtual environment, built once; everything else runs from it.
#   make            lists the targets
#   PYTHON=...      a Python 3.10-3.12 to build it with (otherwise the first that works is taken)
#   VENV=...        where it stands (.venv)

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install check test faults shear smollm2 clean

VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Candidates are tried by running them: a shim of the right name may exist and still fail.
PYTHON ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.10 python3 python /usr/bin/python3)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## create the virtual environment and install the package, once

$(STAMP): setup.py requirements.txt
	@set -e; found=; \
	for python in $(CANDIDATES); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	      >/dev/null 2>&1; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: none of '$(CANDIDATES)' is a working Python 3.10, 3.11 or 3.12 with venv and pip;" \
	       "install one or name it: make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	echo "building $(VENV) with $$("$$found" --version) ($$found)"; \
	"$$found" -m venv $(VENV)
	$(PY) -m pip install -e '.[dev,examples]'
	@touch $@

check: $(STAMP)  ## lint, types, shell syntax
	$(PY) -m ruff check .
	$(PY) -m mypy
	@for script in .ci/run llmshearing/scripts/*.sh; do bash -n "$$script" || exit 1; done

test: $(STAMP)  ## every test, the slow ones included
	$(PY) -m pytest -n 2

faults: $(STAMP)  ## the long fault suite: runs killed at random, a report of what they survived
	$(PY) tests/faults/campaign.py --report benchmarks/results/faults.json

shear: $(STAMP)  ## the quickstart: corpus, source model, shearing, continued pretraining, table
	$(PY) -m examples.quickstart.run

smollm2: $(STAMP)  ## the same pipeline on SmolLM2-135M
	$(PY) -m examples.smollm2.run

clean:  ## remove the virtual environment and tool caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
