# `make` lists the commands. Each does its own set-up and needs git, make and Python 3.10 or newer, nothing else.

VENV ?= .venv

# The first Python that is new enough and can make virtual environments. Each candidate is run, because a name on PATH
# may be a stand-in that does not work (pyenv), and Debian's Python lacks ensurepip until python3-venv is installed.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3.10 python3 python; do \
    if $$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then echo $$p; break; fi; done)

.PHONY: help demo test test-slow lint clean
.NOTPARALLEL:

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile

demo: $(VENV)/.core-done  ## sample an 8x8 grid of digits into mnist-32x32.png
	@$(VENV)/bin/python example.py

# A process per core, each on one thread: with more threads than cores they slow one another tenfold.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.test-done  ## run the tests
	@$(VENV)/bin/python -m pytest -n auto --maxprocesses=8 --dist=worksteal

test-slow: $(VENV)/.test-done  ## run the tests that `make test` leaves out
	@$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/.test-done  ## check style, format and types
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy

clean:  ## remove .venv and the tools' caches
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The stamp is written last, so an interrupted set-up is taken up again. The test environment contains the core one.
$(VENV)/.test-done: EXTRAS = [test]
$(VENV)/.core-done $(VENV)/.test-done: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Found no Python 3.10 or newer with venv (on Debian: apt install python3-venv); if it is elsewhere: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Setting up $(VENV) (once, about a minute; PyTorch is a large download) ..."
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS)'
	@touch $(VENV)/.core-done $@
