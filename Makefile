# Everything here sets up its own environment in .venv first; all that is needed is Python 3.10+, pip and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := find csrc tests/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
export OMP_WAIT_POLICY ?= passive
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo test bench bench-check cuda-resources reproduce docs lint format clean

demo: $(READY)
	$(BIN)/singe demo

# a process for each core, with a thread each; in alphabetical order, which ends with short files, so that no process waits
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist loadfile --no-loadscope-reorder

bench: $(READY)
	$(BIN)/pytest -q benchmarks --benchmark-columns=min,median,rounds --benchmark-sort=name

# the benchmarks still run, of ResNet-56 on one layer; nothing is timed
bench-check: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q benchmarks --benchmark-disable -n auto -k "not blocks.12 and not blocks.24"

# registers and memory of every CUDA kernel; fails where one spills. Needs nvcc, no GPU
cuda-resources: $(READY)
	$(BIN)/python csrc/cuda/resources.py

# the paper's tables: make reproduce WEIGHTS=resnet56.safetensors DATA=CIFAR10_DIR [FULL=1] [RESULTS=DIR]
reproduce: $(READY)
	$(BIN)/pip install --quiet --no-build-isolation -e '.[peers]'
	$(BIN)/python benchmarks/reproduce.py all --weights $(WEIGHTS) --data $(DATA) $(if $(FULL),--full) $(if $(RESULTS),--results $(RESULTS))

# the API reference, from the docstrings: build/api/index.html
docs: $(READY)
	$(BIN)/pdoc --docformat google --output-directory build/api singe

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$($(NATIVE))

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$($(NATIVE))

# torch first and pinned, so that building without isolation compiles against the torch that will be used
$(READY): pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f ! -name '*.py*')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0 'setuptools>=77' 'cmake>=3.28' ninja pybind11
	SINGE_WERROR=1 $(BIN)/pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info singe/*.so
