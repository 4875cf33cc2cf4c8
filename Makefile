# `make study` and `make test` do everything on a fresh machine: they build .venv and use it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := .venv-peers
# Processes that test.
JOBS   ?= 2

.PHONY: study test test-all docs lesson lesson-data peers lint format bench clean
.DEFAULT_GOAL := help

help:
	@echo "make study     set up and run the main study (spiral); prints the leaderboard and the report's path"
	@echo "make test      set up and run the tests"
	@echo "make test-all  the slow, GPU and large-data tests too"
	@echo "make docs      the site, in docs/_build"
	@echo "make lesson    the lesson alone, one file: docs/_build/lesson.html"
	@echo "make lesson-data  train the lesson's networks again, for docs/lesson/data.json"
	@echo "make peers     trajectories and scores against other libraries', in .venv-peers"
	@echo "make lint      ruff and mypy"
	@echo "make bench     side-by-side timings against plain PyTorch, diffusers and SciPy"

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up .venv, which takes a minute or more, once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

study: $(STAMP)
	$(BIN)/reparam study spiral --out runs/spiral

# A file of tests is one process's, with one thread: most networks here are too small for two.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m ''

docs: $(STAMP)
	$(BIN)/python -m sphinx -E -a -W --keep-going -q -b html docs docs/_build
	@echo "the site: docs/_build/index.html"

lesson: $(STAMP)
	$(BIN)/python docs/lesson/build.py docs/_build/lesson.html

lesson-data: $(STAMP)
	$(BIN)/python docs/lesson/data.py

# The peers ask for torchvision, which brings a torch of its own; what is compared does without it, hence --no-deps.
$(PEERS)/.installed: pyproject.toml constraints.txt constraints-peers.txt
	@echo "setting up .venv-peers, which takes a minute or more, once"
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-peers.txt \
		-e . pytest einops pillow scipy torchdiffeq torchsde
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-peers.txt --no-deps \
		azula clean-fid denoising-diffusion-pytorch k-diffusion lightning-utilities torch-fidelity torchmetrics
	touch $@

peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest tests/peers

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
	$(BIN)/python benchmarks/training.py overhead
	$(BIN)/python benchmarks/training.py unet
	$(BIN)/python benchmarks/evaluation.py

clean:
	rm -rf $(VENV) $(PEERS) docs/_build build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
