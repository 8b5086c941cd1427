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
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup test demo docs lint format info wheel gpu clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10
	@echo "Variables: PYTHON=/path/to/python, TORCH='$(TORCH)', ARGS='more arguments'"

setup: $(VENV)/compiled  ## .venv with the package and all it needs, kernels compiled

test: setup  ## run the tests
	$(RUN) -m pytest $(ARGS)

demo: setup  ## train on noisy digits, without and with SANM; results in runs/demo
	$(VENV)/bin/sanm demo --overwrite --out runs/demo $(ARGS)

docs: setup  ## the pages of docs/ in build/docs/html; a broken link is an error
	$(RUN) -m sphinx -M html docs build/docs --quiet --fresh-env --fail-on-warning --keep-going

lint: setup  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup  ## rewrite the sources in the project's format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

info: setup  ## versions, and which backend serves each operator
	$(RUN) -m sanm_kernels info

wheel: setup  ## dist/sanm_kernels-*.whl, for every Python
	rm -rf build/lib build/lib.*
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# Not in .venv: a machine with a GPU has its own torch and Triton, and may have no network.
gpu:  ## with PYTHON's own packages: build, GPU tests, sanitizer, benchmarks
	$(or $(PYTHON),python3) -m benchmarks.gpu $(ARGS)

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

$(VENV)/installed: pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 with venv was found: PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" ninja
	@$(PYTHON) -c "$$LINK_TORCH"
	@$(RUN) -c "import torch" 2>/dev/null || { set -x; $(PIP) "$(TORCH)"; }
	$(PIP) --no-build-isolation --editable ".[train,test,docs]"
	@touch $@

$(VENV)/compiled: $(VENV)/installed $(shell find csrc -type f)
	$(RUN) setup.py --quiet build_ext --inplace
	@touch $@
