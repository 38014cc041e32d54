# Nothing but Python (>= 3.10) and make is needed: every target sets up .venv on its first run.

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench

# One thread a worker: small tensors run faster so, and the workers do not fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install check format test test-slow sanitize demo demo-full bench bench-full bench-gpu bench-data clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: $(DEV) ## create .venv and install everlong with its demo and developer tools

check: $(DEV) ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(DEV) ## the tests, minutes on two cores
	$(PYTEST) -m "not slow"

# gcc's: what watches is in Python's process before the library is, and before it what it asks for.
WATCH := -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined

sanitize: $(DEV) ## the operations' tests with the C code watched: no access out of bounds, nothing undefined
	EVERLONG_NATIVE_FLAGS="$(WATCH)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libstdc++.so.6)" \
		$(PYTEST) --capture=sys -m "not slow" tests/ops $(wildcard tests/test_states*.py)

test-slow: $(DEV) ## the long tests, and the laws by PyTorch's operations alone
	$(PYTEST) -m slow
	EVERLONG_BACKEND=eager $(PYTEST) -m "not slow" tests/test_laws.py tests/models/test_titans_blocks.py

demo: $(DEV) ## train a memory and a Transformer, find needles with both, draw runs/demo/needle.png
	$(BIN)/everlong demo

demo-full: $(DEV) ## the demo to 2M tokens and more, with every block, its rivals and three seeds
	$(BIN)/everlong demo --full

bench: $(BENCH) ## speed and memory beside the rivals, about 5 minutes on two cores
	$(BIN)/python benchmarks/run.py

bench-full: $(BENCH) ## the same over all sizes and up to millions of tokens, hours; draws docs/images
	$(BIN)/python benchmarks/run.py --full --out benchmarks/results --images docs/images

bench-gpu: $(BENCH) ## the same as bench on a GPU, if there is one
	$(BIN)/python benchmarks/run.py --device cuda

bench-data: $(DEV) ## speed and memory of tokenising and of the data set
	$(BIN)/python benchmarks/data.py

clean: ## remove .venv and what builds and tools left (runs/ stays)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "everlong needs Python 3.10 or newer, got $$($(PYTHON) --version 2>&1):" \
		"run make with PYTHON=/path/to/python3.10 or newer" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# torch goes in by itself first: the packages that need it then take the build that is there.
$(DEV): $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,dev]'
	@touch $@

$(BENCH): $(DEV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	@touch $@
