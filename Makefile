# Everything a fresh machine needs is Python 3.11+ and make. The first target that needs it makes .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRL := .venv-trl

.PHONY: demo test test-all lint format bench tiny-base clean

demo: $(READY)
	$(BIN)/posttrain demo

test: $(READY)
	$(BIN)/pytest -m "not slow"

test-all: $(READY)
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check src tests recipes benchmarks
	$(BIN)/ruff format --check src tests recipes benchmarks
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix src tests recipes benchmarks
	$(BIN)/ruff format src tests recipes benchmarks

bench: $(READY) $(TRL)/.ready
	$(BIN)/python benchmarks/bench.py --theirs $(TRL)/bin/python $(if $(VLLM),--vllm $(VLLM))

tiny-base: $(READY)
	$(BIN)/python recipes/tiny-base/make.py

clean:
	rm -rf $(VENV) $(TRL)

# The constraints pin the CPU build of torch: an open range would fetch gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

$(TRL)/.ready: constraints.txt
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch trl==1.16.0
	touch $@
