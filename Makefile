# make tune   sets up everything and runs the main job: which normalization and learning rate do the digits want?
# make test   sets up everything and runs all tests
# make lint   format, lint and types

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt --editable

.PHONY: tune test lint clean

tune: .venv/tune.stamp
	$(BIN)/normwise tune --out runs/digits $(if $(wildcard runs/digits/study.db),--resume)

test: .venv/dev.stamp
	$(BIN)/pytest --numprocesses 2 --cov --cov-report term:skip-covered

lint: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/tune.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[tune]'
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .coverage
