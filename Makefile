# `make help` lists the targets.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest
GPU_PYTHON ?= $(BIN)/python
RESULTS := tests/bench/results.txt

# The first supported Python on the PATH.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-lowest test-gpu sweep check bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv with dtrain and its dependencies

quickstart: $(INSTALLED) ## install, then train a real model in two stages (about five minutes)
	$(BIN)/dtrain run quickstart

# One file per core; a distributed test waits for its slowest rank most of the time. The longest test,
# of architectures, starts first: xdist itself would begin with the files of most tests.
test: export OMP_NUM_THREADS = 1
test: $(INSTALLED) ## install, then run all tests that need no GPU
	$(BIN)/pytest -q -n 2 --dist loadfile tests/unit tests/gpu
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
		tests/architectures tests/integration tests/distributed
	$(BIN)/pytest -q -n 2 --dist worksteal tests/slurm

test-lowest: export OMP_NUM_THREADS = 1
test-lowest: $(LOWEST)/.installed ## golden losses with the oldest allowed libraries and a newer torch
	$(LOWEST)/bin/pytest -q tests/distributed/test_golden.py \
		-k "two_ranks and (ddp or lora and not qlora)"

sweep: $(INSTALLED) ## train each causal-LM type of transformers, write tests/architectures/table.txt
	$(BIN)/python tests/architectures/sweep.py --write

test-gpu: ## run the checks for one GPU (GPU_PYTHON=python3 for an image's own Python)
	PYTHONPATH=. $(GPU_PYTHON) -m pytest -q tests/gpu

check: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Run one script, append its table to $(RESULTS), and stop at the first that fails.
define measure
@echo "== $(1)" | tee -a $(RESULTS)
@$(BIN)/python tests/bench/$(1) | tee -a $(RESULTS)
endef

bench: SHELL := bash
bench: .SHELLFLAGS := -eo pipefail -c
bench: $(INSTALLED) ## measure speed against TRL (DATA=alpaca.json, TEXT=book.txt; about an hour)
	@test -f "$(DATA)" || { echo "error: name a file of instructions: make bench DATA=..." >&2; exit 2; }
	@{ date -u; grep -m1 "model name" /proc/cpuinfo; nproc; git rev-parse HEAD; } > $(RESULTS) || true
	$(call measure,cold_start.py)
	$(call measure,step_speed.py $(DATA) --peers packed padded)
	$(call measure,step_speed.py $(DATA) --method full)
	$(call measure,step_speed.py $(DATA) --method qlora)
	$(call measure,step_speed.py $(DATA) --tokens 8192 --checkpointing --pairs 1 --steps 0)
	$(if $(TEXT),$(call measure,step_speed.py $(TEXT) --kind cpt --tokens 2048))
	$(call measure,step_engines.py $(DATA))
	$(call measure,step_losses.py $(DATA))

# torch is installed first, from the constraints, so that no range can pull another build.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "error: dtrain needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(LOWEST)/.installed: pyproject.toml constraints.txt tests/lowest.py
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install -q -c $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip install -q -c $(LOWEST)/constraints.txt -e . hypothesis pytest pytest-timeout
	@touch $@
