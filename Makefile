# The two commands are `make demo` and `make test`; each sets up what it needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODE   ?= standalone
ARGS   ?=
DURATION ?= 180
WORKERS ?= 4
CORE := soma_common/events/store.py,soma_common/events/append.py,soma_common/postgres/cursor.py,soma_common/postgres/shards.py,soma_common/outbox/*,soma_common/inbox.py,soma_common/consumer/pipeline.py,soma_common/consumer/effects.py,soma_common/consumer/lanes.py,soma_common/consumer/positions.py,soma_common/consumer/suspects.py,soma_common/consumer/attempts.py,soma_common/consumer/redrive.py,soma_common/consumer/session.py,soma_common/dlq/store.py
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-other bench torture torture-mutants torture-sagas torture-sagas-mutants storm lint format docs site screenshots wheel clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-22s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

setup: $(VENV)/.ready ## The virtual environment with everything that is needed

demo: setup ## A week of flights through the library, with kills (MODE=standalone or somastack)
	$(BIN)/python -m examples.flights demo --mode $(MODE) $(ARGS)

test: setup ## All tests, on real servers; unit and property tests on every other installed Python too
	$(BIN)/python -m tests.prepare
	$(BIN)/python -m coverage erase
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --cov --cov-report= tests
	$(BIN)/python -m coverage report --fail-under=85
	@echo "The core: store, cursor, relay, inbox"
	$(BIN)/python -m coverage report --fail-under=95 --include='$(CORE)'
	@$(MAKE) --no-print-directory test-other

test-other: setup ## Unit and property tests on each other installed Python 3.11 to 3.14
	@sh tests/other_pythons.sh

bench: setup ## All benchmarks: tables here, JSON in benchmarks/results/
	$(BIN)/python -m benchmarks

torture: setup ## Kill everything at random for DURATION seconds and check the history
	$(BIN)/python -m tests.torture --duration $(DURATION)

torture-sagas: setup ## The same for sagas: workers, connections and the database; every saga ends right, to the cent
	$(BIN)/python -m tests.torture --sagas --duration $(DURATION)

torture-sagas-mutants: setup ## Break the sagas on purpose, one promise at a time; the checker must notice
	$(BIN)/python -m tests.torture --sagas --mutants

storm: setup ## Members of a consumer group come and go every second, for DURATION seconds
	$(BIN)/python -m tests.torture --storm --duration $(DURATION)

torture-mutants: setup ## Break the library on purpose, one promise at a time; the checker must notice
	$(BIN)/python -m tests.torture --mutants

lint: setup ## Format, rules, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## Put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

screenshots: setup ## Pictures of every page of the console, by a real browser, into build/screenshots
	SOMA_TEST_SCREENSHOTS=build/screenshots $(BIN)/python -m pytest -q tests/integration/console/test_browser.py

docs: setup ## Run every snippet of README and docs
	$(BIN)/python -m pytest -q tests/docs

site: setup ## The documentation as a site, in build/site; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/site
	@echo "build/site/index.html"

wheel: setup ## Build and check the distribution
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

clean: ## Remove what was built
	rm -rf $(VENV) .venv-* build dist .soma .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis
