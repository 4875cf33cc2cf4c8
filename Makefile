# `make study` and `make test` do everything on a fresh machine: they build .venv and use it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: study test test-all lint format bench clean
.DEFAULT_GOAL := help

help:
	@echo "make study     set up and run the main study (spiral); prints the leaderboard and the report's path"
	@echo "make test      set up and run the tests"
	@echo "make test-all  the slow, GPU and large-data tests too"
	@echo "make lint      ruff and mypy"
	@echo "make bench     side-by-side timings against plain PyTorch and SciPy"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

study: $(STAMP)
	$(BIN)/reparam study spiral --out runs/spiral

test: $(STAMP)
	$(BIN)/python -m pytest

test-all: $(STAMP)
	$(BIN)/python -m pytest -m ''

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/spiral.py
	$(BIN)/python benchmarks/jit.py
	$(BIN)/python benchmarks/frechet.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
