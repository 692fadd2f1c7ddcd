# `make serve` and `make test` do everything on a machine with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
export OLYMPUS_CACHE_DIR ?= $(CURDIR)/.cache

.PHONY: serve test test-all bench lint format lock clean help
.DEFAULT_GOAL := help

help:            ## list the commands
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## */\t/' | expand -t 12

$(VENV)/.serve: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Olympus needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

serve: $(VENV)/.serve ## set up and run the server: dashboard and API on http://127.0.0.1:5000
	exec $(BIN)/python app.py

# Unit tests share nothing, so they run in two processes; servers, browsers and clocks want the machine for themselves.
test: lint ## set up, check the style and pass the tests
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(PYTEST_ARGS) tests/unit
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS) tests/e2e tests/integration tests/peers tests/reliability

test-all: lint ## everything, with the slow proofs
	OLYMPUS_HYPOTHESIS=explore $(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.dev ## print the ratios that we claim
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/workspace.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/dashboard.py

lint: $(VENV)/.dev ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/lint-imports

format: $(VENV)/.dev ## rewrite in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:            ## pin again what requirements*.txt pull in
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	sed '/^-c /d' requirements.txt > .venv-lock/requirements.txt
	sed 's|^-r .*|-r requirements.txt|' requirements-dev.txt > .venv-lock/requirements-dev.txt
	.venv-lock/bin/python -m pip install --quiet -r .venv-lock/requirements-dev.txt
	(head -1 constraints.txt; .venv-lock/bin/python -m pip freeze | sed 's/+cpu$$//') > constraints.new && mv constraints.new constraints.txt
	rm -rf .venv-lock

clean:           ## remove the environment and caches, never the data
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
