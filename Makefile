# Everything below sets itself up in .venv; nothing but Python 3.11 (to 3.13) is needed.
PROFILE ?= cpu
VENV := .venv
STAMP := $(VENV)/installed
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$python && break; \
	done)

# What README quotes of them.
BENCHMARKS := scale decode mixed_deltas

.PHONY: help reproduce test lint benchmarks
.DEFAULT_GOAL := help

help:
	@echo 'make reproduce                the course, in order, with the shipped checkpoints (PROFILE=cpu)'
	@echo 'make reproduce PROFILE=smoke  the same at tiny size, everything trained from nothing'
	@echo 'make reproduce PROFILE=gpu    the same models asked more, and farther: the full sweep, for a GPU'
	@echo 'make reproduce RETRAIN=1      trains anew instead of using checkpoints that fit'
	@echo 'make test                     the tests'
	@echo 'make benchmarks               the benchmarks that README quotes, on one thread; writes them into the ledger'
	@echo 'make lint                     style, notebooks without outputs, quoted numbers against the ledger'
	@echo 'PYTHON=... chooses the Python (3.11 to 3.13) that .venv is made with'

# One step: done once, and again when what is installed changes. A set-up that was cut short has no stamp.
$(STAMP): requirements.lock pyproject.toml
	@test -n '$(PYTHON)' || { echo 'Python 3.11, 3.12 or 3.13 was not found; install one, or name it: make PYTHON=/path/to/python'; exit 1; }
	@echo 'Setting up $(VENV), once; this takes some minutes.'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

reproduce: $(STAMP)
	$(VENV)/bin/prosg reproduce --profile $(PROFILE) $(if $(filter-out 0,$(RETRAIN)),--retrain)

# A process a core, of one thread each; the tests of a file stay together, because they share what is slow to make.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/prosg check

benchmarks: $(STAMP)
	for name in $(BENCHMARKS); do OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/$$name.py --keep || exit 1; done
