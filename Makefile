# Two commands are enough on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Where pip finds torch: e.g. TORCH_ARGS="--index-url <PyTorch's index of CPU wheels>" for a small build without CUDA
TORCH_ARGS ?=
# one thread a process: the tests already run in as many processes as there are cores
THREADS = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test install dev lint format types bench readme results docs clean

demo: $(VENV)/demo
	$(BIN)/attune demo

test: $(VENV)/dev
	$(THREADS) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests -n auto --dist worksteal -p no:logging -rs $(ARGS)

install: $(VENV)/demo
	@echo 'source $(VENV)/bin/activate   # then `attune` and `import attunement` work in this shell'
dev: $(VENV)/dev

$(VENV)/torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) --constraint constraints.txt torch
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	touch $@ $(VENV)/demo

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/dev
	$(BIN)/mypy

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks $(ARGS)

readme: $(VENV)/dev
	$(BIN)/python docs/readme.py

# What attune recommend knows without a study: the final runs of docs/studies in one file of the package
results: $(VENV)/dev
	$(BIN)/python -m attunement.compare.shipped docs/studies runs/compare

docs: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet --site-dir build/site

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
