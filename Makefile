# make demo    a small DeepSeek-V3 through torch.compile(backend="dsinfra"), compared with eager
# make test    lint, types and every test this machine can run
# make format  the source as `make test` wants it
# make tables  README's tables from bench/results/*.json
#
# Each sets itself up in .venv the first time. On a machine that already has torch and no network:
#   make PYTHON=python3 VENV=system test

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
# Only where torch brings none (its CPU builds): the interpreter and the compile-only tier need it.
TRITON ?= 3.6.0

.PHONY: demo test lint format types pytest tables clean

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
OTHERS := .venv-triton/.ready .venv-tf517/.ready .venv-tf512/.ready
# Folders with other versions: tests put one first on the PYTHONPATH of a process of their own.
export DSINFRA_TRITON_NEWEST := $(CURDIR)/.venv-triton
export DSINFRA_TF_5_17 := $(CURDIR)/.venv-tf517
export DSINFRA_TF_5_12 := $(CURDIR)/.venv-tf512
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

# Two processes of one thread each; a file's tests stay in one, as they share what they compile.
pytest: $(READY) $(OTHERS)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -q \
	  $$($(PY) -c 'import xdist; print("-n", 2, "--dist", "loadfile")' 2>/dev/null)

tables: $(READY)
	$(PY) -m bench.table

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

clean:
	rm -rf .venv .venv-triton .venv-tf517 .venv-tf512 .pytest_cache .mypy_cache .ruff_cache build *.egg-info
