# make quickstart   fine-tune a real 135M model on real data, on this machine (minutes on 2 CPU cores)
# make test         run the tests
# make check        lint, format, types, import layers
# make gpu          kernel tests natively on the GPU, parity, then the benchmarks
# make docs         the guide as a site: build/site/index.html
# make wheelhouse   every wheel into a folder, for a GPU machine without a network (docs/installing.md)
#
# Each makes .venv itself when it is missing. Variables: PYTHON (3.11 or newer), TORCH, JOBS, OUT.

PYTHON ?= python3
# Installed first, so that nothing else decides which build of torch comes. Ignored when PYTHON already has one.
TORCH ?= torch==2.13.0
JOBS ?= 2
OUT ?= outputs/quickstart
# The wheelhouse is for another machine: its Python (empty: as here), its extras, its torch (empty: it has one).
WHEELHOUSE ?= build/wheels
WHEELS_PYTHON ?=
WHEELS_EXTRAS ?= gpu,gguf,quickstart
WHEELS_TORCH ?= torch==2.11.0
WHEELS_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_TEST := $(VENV)/.ready-test
READY_DEV := $(VENV)/.ready-dev
READY_DOCS := $(VENV)/.ready-docs
SETUP := scripts/setup_venv.py

.DEFAULT_GOAL := help
.PHONY: help quickstart test check format gpu docs wheelhouse clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

$(READY): pyproject.toml $(SETUP)
	@$(PYTHON) $(SETUP) --venv $(VENV) --torch '$(TORCH)' --extras quickstart --stamp $@

$(READY_TEST): pyproject.toml $(SETUP)
	@$(PYTHON) $(SETUP) --venv $(VENV) --torch '$(TORCH)' --extras quickstart,test --stamp $@ --also $(READY)

$(READY_DEV): pyproject.toml $(SETUP)
	@$(PYTHON) $(SETUP) --venv $(VENV) --torch '$(TORCH)' --extras quickstart,dev --stamp $@ --also $(READY) $(READY_TEST)

$(READY_DOCS): pyproject.toml $(SETUP)
	@$(PYTHON) $(SETUP) --venv $(VENV) --torch '$(TORCH)' --extras quickstart,docs --stamp $@ --also $(READY)

quickstart: $(READY)
	@$(BIN)/python -m pronghorn.cli quickstart --out $(OUT)

# One thread a worker: the models are tiny, and two workers that each start a thread per core only wait for one another.
test: $(READY_TEST)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: $(READY_DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY_DEV)
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

gpu: $(READY_TEST)
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu needs a CUDA GPU, and torch sees none")'
	@$(BIN)/python -m pytest tests/kernels tests/memory tests/engine tests/training
	@$(BIN)/python -m benchmarks.verify --record benchmarks/results/parity.json
	@$(BIN)/python -m benchmarks.run --workload llama8b-lora,llama8b-qlora,qwen1.5b-lora --out benchmarks/results/mine.csv

# The variable silences an advertisement of the theme's makers.
docs: $(READY_DOCS)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheelhouse:
	@$(PYTHON) scripts/wheelhouse.py --to '$(WHEELHOUSE)' --extras '$(WHEELS_EXTRAS)' --torch '$(WHEELS_TORCH)' \
		--index '$(WHEELS_INDEX)' --python '$(WHEELS_PYTHON)'

clean:
	rm -rf $(VENV) outputs build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
