# make quickstart: install, then train a real model in two stages.  make test, make check: as they say.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTENSIONS := $(CURDIR)/$(VENV)/extensions

# The first Python that dtrain runs on.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)

.PHONY: quickstart test check install
install: $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/dtrain run quickstart

# One test file a core; the distributed ones start several processes each, so one after the other.
test: export OMP_NUM_THREADS = 1
test: export TORCH_EXTENSIONS_DIR = $(EXTENSIONS)
test: $(INSTALLED) $(EXTENSIONS)/.built
	$(BIN)/pytest -q -n 2 --dist loadfile tests/unit
	$(BIN)/pytest -q $(wildcard tests/distributed tests/integration)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and from the constraints, so that no range can pull another.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "error: dtrain needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# On a CPU DeepSpeed compiles one extension at its first start: here, not inside a test's time limit.
# What a build that was stopped left behind would make the next one wait for ever.
$(EXTENSIONS)/.built: $(INSTALLED)
	rm -rf $(EXTENSIONS)
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(EXTENSIONS) PATH="$(CURDIR)/$(BIN):$$PATH" \
		$(BIN)/python -c "from deepspeed.accelerator import get_accelerator as cpu; \
		cpu().create_op_builder('ShareMemCommBuilder').load()"
	@touch $@
