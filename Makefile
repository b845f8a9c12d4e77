# make demo    a small DeepSeek-V3 through torch.compile(backend="dsinfra"), compared with eager
# make test    lint, types and every test this machine can run
# make format  the source as `make test` wants it
# make tables  README's tables from bench/results/*.json
# make golden  accepts what the golden tests find (tests/golden): read the difference before you commit it
#
# Each sets itself up in .venv the first time. On a machine that already has torch and no network:
#   make PYTHON=python3 VENV=system test

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
# Only where torch brings none (its CPU builds): the interpreter and the compile-only tier need it.
TRITON ?= 3.6.0

.PHONY: demo test lint format types pytest tables golden clean

ifeq ($(VENV),system)

# Nothing is installed: the checkout is found through PYTHONPATH, and tools that are missing are named and left out.
PY := $(PYTHON)
READY :=
OTHERS :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
optional = $(PY) -m $(1) --version >/dev/null 2>&1 || { echo "$(1) is not installed: left out"; exit 0; };

else

PY := $(VENV)/bin/python
READY := $(VENV)/.ready
OTHERS := .venv-triton/.ready .venv-tf517/.ready .venv-tf512/.ready .venv-titan/.ready
# Folders with other versions: tests put one first on the PYTHONPATH of a process of their own.
export DSINFRA_TRITON_NEWEST := $(CURDIR)/.venv-triton
export DSINFRA_TF_5_17 := $(CURDIR)/.venv-tf517
export DSINFRA_TF_5_12 := $(CURDIR)/.venv-tf512
export DSINFRA_TITAN := $(CURDIR)/.venv-titan
optional =

endif

demo: $(READY)
	$(PY) -m dscompile.cli demo

test: lint types pytest

lint: $(READY)
	@$(call optional,ruff) $(PY) -m ruff check . && $(PY) -m ruff format --check .

format: $(READY)
	$(PY) -m ruff check --fix-only -q . ; $(PY) -m ruff format .

types: $(READY)
	@$(call optional,mypy) $(PY) -m mypy

# Two processes of one thread each; a file's tests stay in one, as they share what they compile. tests/conftest.py has
# the order of the files.
pytest: $(READY) $(OTHERS)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -q \
	  $$($(PY) -c 'import xdist; print("-n", 2, "--dist", "loadfile", "--no-loadscope-reorder")' 2>/dev/null)

tables: $(READY)
	$(PY) -m bench.table

# A test of golden texts has `golden` in its name.
golden: $(READY)
	@DSINFRA_ACCEPT=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -q -k golden

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q torch==$(TORCH) 'numpy<2.4'
	$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install -q triton==$(TRITON)
	$(PY) -m pip install -q -e '.[test]'
	touch $@

.venv-triton/.ready:
	$(PYTHON) -m pip install -q --target $(@D) --no-deps --upgrade triton
	touch $@

.venv-tf517/.ready: VERSION := 5.17.0
.venv-tf512/.ready: VERSION := 5.12.1
.venv-tf517/.ready .venv-tf512/.ready:
	$(PYTHON) -m pip install -q --target $(@D) --upgrade transformers==$(VERSION) 'numpy<2.4'
	touch $@

# Without its dependencies, which would bring another torch: what the models import, and no more.
.venv-titan/.ready:
	$(PYTHON) -m pip install -q --target $(@D) --no-deps --upgrade torchtitan==0.3.0 spmd-types==0.2.3 \
	  tyro docstring_parser typeguard
	touch $@

clean:
	rm -rf .venv .venv-triton .venv-tf517 .venv-tf512 .venv-titan .pytest_cache .mypy_cache .ruff_cache build *.egg-info
