# One virtual environment, built once; everything else runs from it.
#   make            lists the targets
#   PYTHON=...      a Python 3.10-3.12 to build it with (otherwise the first that works is taken)
#   STACK=current   the newest torch and transformers in place of those that Composer pins, in .venv-current
#   VENV=...        where it stands (.venv)

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install check test faults shear smollm2 clean

STACK ?= default
VENV ?= $(if $(filter current,$(STACK)),.venv-current,.venv)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Candidates are tried by running them: a shim of the right name may exist and still fail.
PYTHON ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.10 python3 python /usr/bin/python3)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## create the virtual environment and install the package, once

ifeq ($(filter default current,$(STACK)),)
$(error STACK=$(STACK): known are default and current)
endif

# What needs no Composer; of what does, a short run of training. The default stack compares both (tests/test_stacks.py).
CORE_TESTS := tests/families tests/fold tests/masks tests/storage tests/prune tests/checkpoints tests/evaluate \
  tests/megatron/test_convert.py tests/megatron/test_bad_shards.py tests/megatron/test_prune_shards.py \
  tests/data/test_mds_format.py tests/test_imports.py tests/test_files.py tests/test_commands.py
TRAIN_TESTS := tests/training/test_families.py tests/training/test_loss.py

ifeq ($(STACK),current)
WHAT := -r requirements-current.txt -e '.[test,examples]'
# Without the slow ones, to fit into CI: the other stack runs them.
TESTS := -m 'not slow' $(CORE_TESTS) $(TRAIN_TESTS)
else
WHAT := -e '.[train,dev,examples]'
TESTS :=
endif

$(STAMP): setup.py requirements.txt requirements-current.txt
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
	$(PY) -m pip install $(WHAT)
ifeq ($(STACK),current)
	$(PY) -m pip install --no-deps $$(grep -E '^mosaicml' requirements.txt)
	@$(PY) -c 'import torchvision' 2>/dev/null || \
	  cp stacks/torchvision.py "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
endif
	@touch $@

check: $(STAMP)  ## lint, types, shell syntax
	$(PY) -m ruff check .
	$(PY) -m mypy
	@for script in .ci/run llmshearing/scripts/*.sh; do bash -n "$$script" || exit 1; done

test: $(STAMP)  ## every test, the slow ones included; with STACK=current those of the core and short training that are not slow
	$(PY) -m pytest -n 2 $(TESTS)

faults: $(STAMP)  ## the long fault suite: runs killed at random, a report of what they survived
	$(PY) tests/faults/campaign.py --report benchmarks/results/faults.json

shear: $(STAMP)  ## the quickstart: corpus, source model, shearing, continued pretraining, table
	$(PY) -m examples.quickstart.run

smollm2: $(STAMP)  ## the same pipeline on SmolLM2-135M
	$(PY) -m examples.smollm2.run

clean:  ## remove the virtual environment and tool caches
	rm -rf .venv .venv-current .mypy_cache .ruff_cache .pytest_cache .hypothesis
