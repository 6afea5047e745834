# Each command sets up what it needs; the second call skips the set-up.
#   make study    the whole study on embedded data: figures/, a table, a report
#   make test     export in sync, then pytest, and beside it notebooks and every stage at profile ci
#   make lab      JupyterLab          make docs     the site, into site/
#   make check    export in sync, notebooks clean, README in sync, ruff
#   make setup    the environment     make readme   README.md from nbs/index.ipynb
# PYTHON=python3.12 makes the environment with another interpreter, VENV=folder puts it elsewhere,
# PROFILE=ci|quick|full chooses the size of the study.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup environment study test notebooks stages check lab docs readme pin clean

PYTHON_GIVEN := $(filter-out undefined file,$(origin PYTHON))
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= quick
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
OTHER_CORES := $(shell echo $$(( $(CORES) > 2 ? $(CORES) - 1 : 1 )))

BIN := $(abspath $(VENV))/bin
KEY := $(shell cat settings.ini setup.py constraints.txt | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.setup-$(KEY)
# An environment made by another Python than the one asked for is made anew; one that nobody argued about is kept.
IDENTITY := -c 'import sys; print(sys.version)'
OTHER := $(if $(PYTHON_GIVEN),$(shell \
  [ "$$($(PYTHON) $(IDENTITY))" = "$$($(BIN)/python $(IDENTITY) 2>/dev/null)" ] || echo yes))
READY := $(if $(OTHER),,$(wildcard $(STAMP)))
export PATH := $(BIN):$(PATH)

# Notebooks, kernels and tests work in folders of their own: the data folder must not depend on where one stands.
ifneq ($(SSL_KIT_DATA),)
export SSL_KIT_DATA := $(shell cd "$(SSL_KIT_DATA)" 2>/dev/null && pwd || echo "$(SSL_KIT_DATA)")
endif

# Tests run beside one another: one thread each, or the cores are sold twice.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1
# Freed memory is kept for the next array, as in the stages (ssl_kit/lab/execute.py says why).
KEEP := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456
QUIET := MPLBACKEND=Agg PYDEVD_DISABLE_FILE_VALIDATION=1 PIP_DISABLE_PIP_VERSION_CHECK=1

help:
	@sed -n 's/^#   \?//p' Makefile | head -5

setup: $(if $(READY),,environment)

environment:
	@if [ -n "$(OTHER)" ] || [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -c 'import sys; sys.exit("ssl_kit needs Python 3.11 or newer, this is " + sys.version.split()[0] + \
	    "; name another one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'; \
	  echo "Setting up $(VENV) (once; some minutes, mostly download)"; \
	  $(PYTHON) -m venv --clear $(VENV); \
	fi
	@$(QUIET) $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs,distributed,page,hpo,hdf5,onnx,bench]'
	@rm -f $(VENV)/.setup-* && touch $(STAMP)

study: setup
	@ssl-kit study --profile $(PROFILE)

test: setup
	@$(MAKE) check
	@beside= && log=$$(mktemp) && trap '[ -z "$$beside" ] || kill $$beside 2>/dev/null || true; rm -f "$$log"' EXIT && \
	  echo "notebooks, then stages at profile ci, beside pytest" && \
	  { $(MAKE) --keep-going CORES=$(OTHER_CORES) notebooks stages >"$$log" 2>&1 & } && beside=$$! && code=0 && \
	  { $(QUIET) $(KEEP) $(ONE_THREAD) python -m pytest || code=$$?; } && \
	  { wait $$beside || { cat "$$log" >&2; echo "make test: a notebook or a stage failed, see above" >&2; code=1; }; } && \
	  exit $$code

# Stages are no tests: they run as stages, below.
notebooks: setup
	@echo "notebooks:" && $(QUIET) $(KEEP) $(ONE_THREAD) nbdev_test --n_workers $(CORES) --skip_folder_re '^([_.]|stages$$)'

# In a folder of their own: nothing is reused, and neither runs/ nor figures/ change.
stages: setup
	@work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && \
	  $(QUIET) SSL_KIT_RUNS="$$work/runs" SSL_KIT_FIGURES="$$work/figures" ssl-kit study --profile ci

check: setup
	@python .ci/check.py && ruff check . && echo "check: export in sync, notebooks clean, README in sync, ruff content"

lab: setup
	@jupyter lab --notebook-dir=. nbs/index.ipynb

docs: setup
	@$(QUIET) NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict && echo "docs: open site/index.html"

readme: setup
	@python .ci/readme.py

pin: setup
	@python .ci/pin.py

clean:
	@rm -rf site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
