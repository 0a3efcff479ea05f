# make tune   sets up everything and runs the main job: which normalization and learning rate do the digits want?
# make test   sets up everything and runs all tests
# make bench  sets up everything and times every layer against torch's, and against a copy of the same bytes
# make bench-gpu  the same for the kernels in Triton, on a machine with a CUDA device, in under 8 minutes
# make lint   format, lint and types
# make wheel  a wheel with the compiled kernels in dist/, checked where there is no compiler
# make sanitize  the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt --editable
KERNELS := hatch_build.py $(wildcard normwise/kernels/csrc/*)

# The first report ends the process; --capture=no lets it be read.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZED := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

.PHONY: tune test bench bench-gpu lint wheel sanitize clean

tune: .venv/tune.stamp
	$(BIN)/normwise tune --out runs/digits $(if $(wildcard runs/digits/study.db),--resume)

test: .venv/dev.stamp
	$(BIN)/pytest --numprocesses 2 --cov --cov-report term:skip-covered

bench: .venv/tune.stamp
	$(BIN)/normwise bench --out runs/bench

bench-gpu: .venv/gpu.stamp
	$(BIN)/python -m benchmarks.gpu

lint: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: .venv/dev.stamp
	rm -rf dist build/installed
	NORMWISE_CPU=require $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/pip install --quiet --no-deps --no-compile --target build/installed dist/*.whl
	env -i PATH=/nowhere PYTHONPATH=build/installed NORMWISE_BACKEND=cpu $(BIN)/python tests/installed.py build/installed

sanitize: .venv/dev.stamp
	rm -rf .sanitize
	mkdir .sanitize
	cp -R normwise tests conftest.py pyproject.toml hatch_build.py .sanitize
	cd .sanitize && NORMWISE_CPU=require CXX="$(CXX)" CXXFLAGS="$(SANITIZERS) -O1 -g1" LDFLAGS="$(SANITIZERS)" \
		$(abspath $(BIN))/python hatch_build.py
	cd .sanitize && $(SANITIZED) $(abspath $(BIN))/pytest --capture=no tests/test_cpu*.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/tune.stamp: .venv/bin/python pyproject.toml constraints.txt $(KERNELS)
	$(INSTALL) '.[tune]'
	touch $@

.venv/gpu.stamp: .venv/bin/python pyproject.toml constraints.txt $(KERNELS)
	$(INSTALL) '.[gpu,tune]'
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt $(KERNELS)
	$(INSTALL) '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .coverage build dist .sanitize
	rm -f normwise/kernels/_cpu.abi3.so normwise/kernels/_cpu_build.json
