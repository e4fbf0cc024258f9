# `make test` and `make demo` need Python 3.11 or newer and nothing else: they set up .venv with the versions of
# constraints.txt, then do their job.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that run tests at the same time; a file's tests stay together, for they share what is slow to make.
JOBS ?= 2

.PHONY: help test demo lint types unit gpu-test format wheel clean

help:
	@echo "make demo    text to Table 3 with small models, then with trained ones; four minutes, no network beyond the installation"
	@echo "make test    lint, types and tests"
	@echo "make lint | types | unit | gpu-test | format | wheel | clean"

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@# What pip would do with one core, here with all; some packages have files for other Pythons, which do not compile.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

gpu-test: $(STAMP)
	$(BIN)/python -m pytest -m gpu

demo: $(STAMP)
	$(BIN)/sinkpretrain demo $(DEMO)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean:
	rm -rf $(VENV) dist demo .pytest_cache .mypy_cache .ruff_cache
