# Two commands for a fresh clone, with nothing but Python >= 3.11, its venv module and make:
#   make quickstart    make test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file's tests stay in one process, since they share fixtures; every process imports torch, so there are not too many.
PARALLEL := -n logical --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test slow lint docs clean

help:
	@echo "make quickstart   install into $(VENV) and train BYOL on printed digits, offline"
	@echo "make test         install into $(VENV) and run the fast tests"
	@echo "make install      install only"
	@echo "make slow         the slow tests"
	@echo "make lint         ruff and mypy"
	@echo "make docs         build the documentation into docs/_build"
	@echo "make clean        remove $(VENV) and whatever was built; runs stay"

install: $(VENV)/installed-test

quickstart: install
	$(BIN)/sslkit train quickstart

test: install
	$(BIN)/python -m pytest $(PARALLEL)

slow: install $(VENV)/installed-docs $(VENV)/installed-lint $(VENV)/installed-notebook
	$(BIN)/python -m pytest -m slow $(PARALLEL)

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build
	@echo "open docs/_build/index.html"

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# An empty file for each set of packages says that it is installed; pyproject.toml being newer makes it stale.

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit("sslkit needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed-%: $(VENV)/made pyproject.toml
	@echo "installing sslkit and the packages for '$*' into $(VENV); the first time PyTorch comes with it, which takes minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $@
