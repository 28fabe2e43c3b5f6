# make quickstart: install, then train a real model in two stages.  make test, make check: as they say.
# make sweep: what each model type of transformers gets.
# make test-gpu: the checks of one GPU.
# make test-lowest: the golden losses again in a second environment, of the oldest libraries allowed.
# make bench DATA=alpaca.json [TEXT=book.txt]: what a start and a step cost here, against TRL, into
# tests/bench/results.txt; about an hour.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest
GPU_PYTHON ?= $(BIN)/python
RESULTS := tests/bench/results.txt

# The first Python that dtrain runs on.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)

.PHONY: quickstart test test-lowest test-gpu sweep check bench install
install: $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/dtrain run quickstart

# One test file a core; the distributed ones start several processes each, so one after the other.
test: export OMP_NUM_THREADS = 1
test: $(INSTALLED)
	$(BIN)/pytest -q -n 2 --dist loadfile tests/unit tests/gpu
	$(BIN)/pytest -q tests/distributed tests/integration tests/architectures
	$(BIN)/pytest -q -n 2 --dist worksteal tests/slurm

# The same losses from the oldest libraries that pyproject.toml allows, and from a newer torch.
test-lowest: export OMP_NUM_THREADS = 1
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/pytest -q tests/distributed/test_golden.py \
		-k "two_ranks and (ddp or lora and not qlora)"

# Every causal-LM type of the installed transformers, into tests/architectures/table.txt.
sweep: $(INSTALLED)
	$(BIN)/python tests/architectures/sweep.py --write

# For one GPU: tests/gpu/README.md.
test-gpu:
	PYTHONPATH=. $(GPU_PYTHON) -m pytest -q tests/gpu

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One script's table on the terminal and in $(RESULTS); the script's status ends the whole.
define measure
@echo "== $(1)" | tee -a $(RESULTS)
@$(BIN)/python tests/bench/$(1) | tee -a $(RESULTS)
endef

bench: SHELL := bash
bench: .SHELLFLAGS := -eo pipefail -c
bench: $(INSTALLED)
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

# torch comes first and from the constraints, so that no range can pull another.
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
