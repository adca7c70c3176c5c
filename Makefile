PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test quick lint shared clean
demo: $(VENV)/installed
	$(BIN)/bitrank demo

test: $(VENV)/installed
	$(MAKE) --jobs=2 lint shared
	$(BIN)/python -m pytest -m alone

# For every save: what a minute can tell.
quick: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not alone' tests/allocator tests/bitrank tests/test_import_layers.py

shared: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not alone'

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) bitrank-demo *.egg-info
