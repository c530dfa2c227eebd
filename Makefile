# Every target sets up what it needs. `make help` lists them.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A process per core, each on one thread: the tests' models are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu check fmt bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo
	@echo "  PYTHON=...       interpreter for .venv, 3.11 or newer (found: $(or $(PYTHON),none))"
	@echo "  TORCH_INDEX=URL  package index for torch alone, e.g. PyTorch's own of CPU wheels"

demo: .venv/.runtime ## the whole job on made-up data: generate, train, report in runs/demo/report.html
	$(BIN)/fastpref demo

test: .venv/.dev ## the tests that need no GPU and no network, under 12 minutes on 2 cores
	$(PYTEST) --timeout 300 -m "not slow and not gpu"

test-all: .venv/.dev ## also the long ones
	$(PYTEST) -m "not gpu"

test-gpu: .venv/.dev ## those that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

check: .venv/.dev ## ruff, mypy, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports

fmt: .venv/.dev ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.dev ## training speed against TRL, contenders interleaved; about half an hour
	$(BIN)/python -m bench train --check

clean: ## remove the environment and the tools' caches; runs/ stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks

# torch comes first, on its own: its build (CPU or CUDA) decides which triton fits, and it alone
# may come from another index, which need not have what torch depends on: that comes with the
# second line. constraints.txt pins everything but triton.
.venv/.runtime: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "fastpref needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --no-compile --no-deps -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet --no-compile -c constraints.txt -e .
	@# Compiles what a run imports, so that the first run does not wait for it; all of it would take longer.
	$(BIN)/python -c "import fastpref.train, fastpref.report.html, matplotlib.pyplot, transformers.models.llama.modeling_llama"
	@touch $@

.venv/.dev: .venv/.runtime
	$(PIP) install --quiet --no-compile -c constraints.txt -e ".[dev,trl,lora,8bit,qlora,datasets,tensorboard]"
	@touch $@
