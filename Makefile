# Two commands from a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: install install-test demo test test-slow test-tpu lint clean

install: $(VENV)/installed
install-test: $(VENV)/installed-test

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt requirements-fast.txt requirements-gcs.txt
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@

demo: install
	$(BIN)/python -m vqgan_jax.tools.demo --out=runs/demo

test: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(TESTS) -m "not slow"

test-slow: install-test
	$(TESTS) -m slow

# The slow tests that compile for slices of TPUs, with libtpu and without a TPU.
test-tpu: install-test
	$(BIN)/python -m pip install --quiet -r requirements-tpu.txt
	$(TESTS) -m slow tests/tools/test_aot.py

lint: install-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
