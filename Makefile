# Two commands do everything on a machine with git, make and python3:
#   make demo   sets up .venv and shows the main job on the embedded model
#   make test   sets up what tests need and runs them all
# and one is for every day:
#   make check  the same, but for the slow tests
.PHONY: help demo check test lint demo-assets clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run in so many processes, each with one thread unless OMP_NUM_THREADS says otherwise, and in random order:
# pytest prints the seed, and `make test PYTEST_ADDOPTS=--randomly-seed=N` repeats it.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

help:
	@echo "make demo         set up .venv and show LoGo on the embedded model"
	@echo "make check        linters, type checker and the fast tests"
	@echo "make test         linters, type checker and the whole test suite"
	@echo "make demo-assets  rebuild the embedded model and its adapters from a seed (up to an hour on two cores)"
	@echo "make clean        remove .venv and caches"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps make a second run skip the installation.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) (once; PyTorch is large) ..."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) with what the tests need (once) ..."
	$(INSTALL) --editable '.[dev]'
	@touch $(VENV)/.installed $@

demo: $(VENV)/.installed
	$(BIN)/logo demo

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(PYTEST) -m "not slow"

test: lint
	$(PYTEST)

demo-assets: $(VENV)/.installed-dev
	$(BIN)/python -m logo.demo.build --out src/logo/demo/assets --seed 0

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
