# Each target sets up what it needs in .venv, pinned by constraints.txt. Needs Python 3.11 or newer and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROCESSES ?= 2
# How pip gets torch, such as --index-url URL of its CPU build.
TORCH ?=
SETUP := $(VENV)/.ready

.PHONY: demo test check slow bench interop readme clean

demo: $(SETUP)  ## compress a real model to int8 and show the proof
	$(BIN)/python examples/demo.py

test: $(SETUP)  ## the quick tests, about ten minutes on 2 cores
	$(BIN)/python -m pytest -q -n $(PROCESSES) --dist loadfile

slow: $(SETUP)  ## the tests that take minutes
	$(BIN)/python -m pytest -q -m slow

check: $(SETUP)  ## lint, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py
	$(BIN)/python -m pytest -q benchmarks/test_speed.py --benchmark-disable

bench: $(SETUP)  ## time the pieces with pytest-benchmark
	$(BIN)/python -m pytest -q benchmarks/test_speed.py

interop: $(SETUP)  ## load the exported folders in the other tools, each in its own environment
	$(BIN)/python benchmarks/interop/run.py

readme: $(SETUP)  ## write the README's tables and plots from the committed rows
	$(BIN)/python benchmarks/readme.py

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "effllm needs Python 3.11 or newer; pass PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .interop demo-out .pytest_cache .mypy_cache .ruff_cache
