# `make demo` and `make test` set up everything they need, then do their job. Calling them again is quick.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
# Most tests use one core at a time, and some wait for long: three keep two cores busy. A file stays together: its
# fixtures are made once. Long files come first.
PYTEST_ARGS ?= -n 3 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos recipes lint clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/.ready  ## create .venv with everything the project needs

.venv/.ready: pyproject.toml constraints.txt .ci/system-packages
	@bash .ci/system-packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "Python 3.11 or 3.12 is needed, $(PYTHON) is $$($(PYTHON) -V); try: make PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@echo "installing packages (about 7 GB the first time) ..."
	@# Compiled here once: where PYTHONDONTWRITEBYTECODE is set, every start of Python would do it for all of torch.
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@# On its own: it is compiled against libraries of the system, which may be missing. Only tests and benchmarks use it.
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[ffcv]' || \
	  echo "left out: ffcv could not be compiled (see above); .beton shards are made and read without it"
	@# So are the loader's own loops: the first run would wait for it.
	@$(BIN)/python -c 'import importlib as i, pipeline.data.fast as f; [*map(i.import_module, (*f.COMPILED, "data_prep.restarts_loop"))]'
	@touch $@

demo: setup  ## shard the digits, train a small NesT with two processes, evaluate and track it (SEED=n)
	@$(BIN)/rookery prep digits shards/digits
	@echo "the run will be in MLflow too: $(BIN)/mlflow ui"
	@$(BIN)/rookery train configs/demo.yaml seed=$(SEED) name=demo-seed$(SEED) --nproc 2

test: setup lint  ## run all tests
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

chaos: setup  ## kill runs of every engine 200 times and compare the bits (ROOKERY_CHAOS_SEED repeats one)
	@ROOKERY_CHAOS_KILLS=200 $(BIN)/python -m pytest -s --timeout 7200 tests/train/test_chaos.py

# Memory that malloc gives back and takes again for every attention map costs half of the time.
recipes: setup  ## take three steps of every recipe with all its layers (half an hour, 20 GB of memory)
	@ROOKERY_WHOLE_RECIPES=1 OMP_NUM_THREADS=$$(nproc) MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 \
	  $(BIN)/python -m pytest tests/test_recipes.py tests/train/test_idle_gpu.py

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff . ; exit 1; }
	@$(BIN)/mypy

clean:  ## remove the environment and caches, keep shards and runs
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache *.egg-info
