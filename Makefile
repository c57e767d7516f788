# The two commands of the README, and what CI runs beside them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
OLDEST_TESTS := tests/engine/test_training.py tests/engine/zero/test_setup.py tests/cli/test_end_to_end.py

.PHONY: help install demo test test-slurm test-oldest test-all lint clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

install: $(INSTALLED)  ## .venv with the pinned versions of requirements.txt and this package

$(INSTALLED): requirements.txt setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "piip_scale needs Python >= 3.10, found %d.%d; say make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED)  ## data, shards, training on two processes, conversion, evaluation, a picture (DATA=... for your own)
	$(BIN)/piip-scale demo $(if $(DATA),--data "$(DATA)") $(if $(IMAGES),--images "$(IMAGES)") $(if $(BOXES_ONLY),--boxes-only)

# Three workers on two cores: while one waits, for a clock or a rank, the others compute.
# Each worker would compile all tests anew where bytecode may not be written.
test: export PYTHONDONTWRITEBYTECODE =
test: $(INSTALLED)  ## everything that can be tested without a GPU and Slurm
	$(BIN)/python -m pytest -m "not slow and not slurm" --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 25

test-slurm: $(INSTALLED)  ## jobs and their faults on a real Slurm, brought up on this machine by launch/minislurm
	$(BIN)/python -m pytest -m "slurm and not slow" tests/slurm

test-oldest: $(OLDEST)/.installed  ## trainings end to end on the oldest torch and torchvision that setup.cfg allows
	$(OLDEST)/bin/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile $(OLDEST_TESTS)

# Its own torch and torchvision; all else is what $(VENV) holds.
$(OLDEST)/.installed: $(INSTALLED)
	$(BIN)/python -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $$(sed -nE 's/^ *torch >=([0-9.]+)$$/torch==\1.0/p' setup.cfg)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $$(sed -nE 's/^ *torchvision >=([0-9.]+)$$/torchvision==\1.0/p' setup.cfg)
	site() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	  echo "import site; site.addsitedir('$$(site $(abspath $(VENV)))')" > "$$(site $(OLDEST))/newest.pth"
	@touch $@

test-all: $(INSTALLED)  ## the slow tests too
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## removes the environments and all runs
	rm -rf $(VENV) $(OLDEST) runs
