# STACK selects mmdet and its maintained fork: `STACK=onedl make test`.
STACK ?= mmdet
VENV_mmdet := .venv
VENV_onedl := .venv-onedl
VENV := $(VENV_$(STACK))
ifeq ($(VENV),)
$(error STACK=$(STACK): expected mmdet or onedl)
endif

# Run, not just looked up: a version manager's shim exists without its Python.
ifndef PYTHON
PYTHON := $(firstword $(foreach p,python3.11 python3,$(shell $(p) -c 'print("$(p)")' 2>/dev/null)))
ifeq ($(PYTHON),)
$(error no python3.11 or python3 on PATH; install Python 3.11, or name one: make PYTHON=/path/to/python3.11)
endif
endif

# Tests at a time. Files stay together: some tests of a file share a trained detector.
WORKERS ?= 2

# Extra arguments, as in: make test ARGS='-m "not slow"'
ARGS ?=

.PHONY: help setup demo test test-unit test-oldest check clean

help:
	@echo 'make setup   make the environment ($(VENV)); the first time compiles mmcv, in about 3 minutes'
	@echo 'make demo    train a small detector on generated images and draw what it finds'
	@echo 'make test    run the tests and the examples in the docstrings'
	@echo 'make test-unit   run those of the mathematics, the losses and the heads, within a minute'
	@echo 'make test-oldest   test what needs PyTorch alone with the oldest that setup.py promises'
	@echo 'make check   check format, lint and types'
	@echo 'make clean   delete the environments and build products; keeps results and the compiled wheels'
	@echo
	@echo 'STACK=mmdet|onedl selects the stack (now $(STACK)), PYTHON=... the Python 3.11 (now $(PYTHON)),'
	@echo 'WORKERS=N runs N tests at a time (now $(WORKERS)).'
	@echo "ARGS='...' adds arguments to demo and the tests. Every target but test-oldest and clean runs setup first."

setup:
	@$(PYTHON) tools/dev/setup_env.py --stack $(STACK)

demo: setup
	$(VENV)/bin/python tools/dev/demo.py $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# Without waiting for a whole file: none of these shares anything that is costly to make.
test-unit: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/unit -n $(WORKERS) $(ARGS)

# An environment of its own, made anew each time.
test-oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -r requirements/oldest.txt
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest tests/unit rambo_det/functional $(ARGS)

check: setup
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

clean:
	rm -rf .venv .venv-onedl .venv-oldest build dist rambo_det.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find rambo_det configs tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
