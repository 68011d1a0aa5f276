# Needs only Python 3.11 and make. `make demo` shows what moekit does, `make test` proves it.
# Any setting may be given on the command line: make setup PYTHON=python3.12 EXTRAS=dev,data,viz
# pip's own variables (PIP_INDEX_URL, ...) are respected. torch's CPU build is a much smaller download than the default
# one on Linux: make setup TORCH_PIP='--index-url <the index of CPU builds that pytorch.org names>'

PYTHON ?= python3.11
VENV ?= .venv
EXTRAS ?= dev
WORKERS ?= 2
TORCH_PIP ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.moekit-$(EXTRAS)

.PHONY: setup demo test check fmt fmt-check lint types bench-quick

setup: $(STAMP)

# torch goes first and alone, so that it may come from an index of its own.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt $(TORCH_PIP) torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/moekit demo

# Two processes of one thread each: faster than one process of two threads, and torch's thread pools do not compete.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

check: fmt-check lint types test

fmt: setup
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

fmt-check: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

bench-quick: setup
	set -e; for bench in benchmarks/[a-z]*.py; do echo "== $$bench"; $(BIN)/python $$bench --quick; done
