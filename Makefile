# `make demo` and `make test` do all the set-up themselves; a second run of either installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo style test fast chaos bench docs lint lock setup screenshot clean help

help:            ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

setup: $(STAMP)  ## the virtual environment with every pinned dependency

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11-3.13 is needed, {v[0]}.{v[1]} found: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $(STAMP)

demo: setup      ## real mp4 files -> features -> four models -> a sweep -> compared runs in MLflow
	@$(BIN)/python -m infra.demo

style: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

test: style      ## style, types and every test (types are one of the tests)
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

fast: style      ## style, and the tests that need no Ray, MLflow or browser
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow"

chaos: setup     ## long: 20 random kills of the extract job, 300 damaged clips, a decoder that misbehaves
	@$(BIN)/python -m tests.benchmarks.chaos
	@$(BIN)/python -m tests.benchmarks.damage
	@FUZZED=300 $(BIN)/python -m pytest -q tests/features/decode/test_fuzz.py

bench: setup     ## the extract job against a plain process pool (needs ../shared/data)
	@$(BIN)/python -m tests.benchmarks.extraction

screenshot: setup  ## MLflow's comparison page of the demo's sweep, as README shows it
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "install chromium and chromedriver first (Debian: apt-get install chromium chromium-driver)"; exit 1; }; \
	  echo "installing the Debian packages chromium and chromium-driver"; \
	  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium chromium-driver >/dev/null; }
	@$(BIN)/python -m infra.screenshot

lint: style      ## style (ruff) and types (mypy)
	@$(BIN)/mypy

docs: setup      ## pages of the Python interface: docs-out/index.html
	@$(BIN)/pdoc --output-directory docs-out --docformat google clcr features.store

lock: setup      ## resolve pyproject.toml again into requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra test --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header --upgrade --quiet --output-file requirements.lock

clean:           ## remove what make made
	rm -rf $(VENV) demo-out docs-out
