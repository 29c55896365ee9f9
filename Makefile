# make demo, make test: everything else follows from these two. Needs Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-settings lint docs check bench certs clean

demo: $(STAMP)
	$(BIN)/python demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

# The tests under five settings, from one thread to a busy machine: an hour. make test-settings ARGS="--twice tests/net"
test-settings: $(STAMP)
	$(BIN)/python -m tests.five_settings $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/, in site/; a broken link, or a page that the menu lacks, is an error.
docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

check: lint docs test

bench: $(STAMP)
	$(BIN)/python -m tests.benchmark

# A throw-away set for TLS in certs/; make certs NAMES="cloud.example 10.0.0.2" for more than this machine.
certs: $(STAMP)
	$(BIN)/python -m neurosurgeon certs $(addprefix --name ,$(NAMES))

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"]))' > $(VENV)/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/dev.txt
	touch $@
