# make test           from a fresh clone: needs Python 3.10+ (venv, pip), a C++ compiler and the package index
# make test PY=python3   with an interpreter that has everything already; installs nothing
#                        with SSMTUNE_CUDA=1 builds the CUDA kernels, too; else that is as in setup.py
#
# TORCH is given to pip as it stands, e.g. TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0

NATIVE := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

ifdef PY
INSTALLED := build/.native $(if $(filter 1,$(SSMTUNE_CUDA)),build/.cuda)
SSMTUNE   := $(PY) -m ssmtune
else
PY        := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
SSMTUNE   := $(VENV)/bin/ssmtune
endif

.PHONY: all demo test bench cuda-check gpu-check sanitize style clean
all: $(INSTALLED)

# every method on one small task, on the CPU: tables and pictures in runs/demo
demo: $(INSTALLED)
	$(SSMTUNE) compare mamba-5m --task docstring-package --preset demo --out runs/demo

# a process for each core, 8 at most, where the interpreter has pytest-xdist
PROCESSES = $(if $(shell $(PY) -c 'import xdist; print(1)' 2>/dev/null),-n auto --maxprocesses 8 --dist worksteal)
test: $(INSTALLED)
	$(PY) -m pytest -q $(PROCESSES)

bench: $(INSTALLED)
	$(PY) -m benchmarks.selective_scan
	$(PY) -m benchmarks.training_step
	$(PY) -m benchmarks.causal_conv1d
	$(PY) -m benchmarks.decoding
	$(PY) -m benchmarks.tables

# the GPU kernels compiled for every target, without a GPU: no spills, and no more instructions than the bounds allow
cuda-check: $(INSTALLED)
	$(PY) -m benchmarks.cuda_instruction_counts --csv build/cuda.csv
	$(PY) -m pytest -q -m "slow or not slow" tests/triton/test_ahead_of_time.py

# on a machine with a GPU, 9 minutes: tests, kernels, decoding, training steps; logs and rows in $(GPU_OUT)
# MAMBA_SSM="mamba-ssm==2.3.2.post1", or an sdist of it, is built first and measured beside
GPU_OUT ?= runs/gpu-check
gpu-check: $(INSTALLED)
	$(PY) -m benchmarks.gpu_check --out $(GPU_OUT) $(if $(MAMBA_SSM),--mamba-ssm "$(MAMBA_SSM)")

# the C++ kernels under the sanitizers of GCC
sanitize: $(INSTALLED)
	PY=$(PY) .ci/sanitize

style: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	if command -v clang-format >/dev/null; then find csrc -name '*.cpp' -o -name '*.h' | xargs clang-format -i; fi

clean:
	rm -rf build dist *.egg-info ssmtune/_C.so ssmtune/_C_cuda.so $(VENV)/.installed

$(VENV)/.requirements: requirements/test.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is not Python 3.10 or newer; name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(TORCH)
	$(VENV)/bin/python -m pip install -q -r requirements/test.txt
	command -v cmake >/dev/null || $(VENV)/bin/python -m pip install -q cmake
	command -v ninja >/dev/null || $(VENV)/bin/python -m pip install -q ninja
	touch $@

# editable: changed Python needs no installing, changed C++ is compiled incrementally in build/cmake
$(VENV)/.installed: $(VENV)/.requirements $(NATIVE)
	$(VENV)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# CMake alone: the interpreter may have no setuptools, or one too old
build/.native: $(NATIVE)
	mkdir -p build
	[ "$(SSMTUNE_BUILD)" = off ] || \
		{ cmake -S . -B build/cmake -DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" -DSSMTUNE_OUTPUT_DIR="$(CURDIR)/ssmtune" && \
		cmake --build build/cmake --target _C --parallel $$(nproc); } || [ "$(SSMTUNE_BUILD)" != require ]
	touch $@

# with SSMTUNE_CUDA=1; nvcc is the one on the PATH, or $$CUDACXX
build/.cuda: $(NATIVE)
	mkdir -p build
	cmake -S . -B build/cuda -DSSMTUNE_CUDA=ON -DSSMTUNE_CUDA_ARCHS="$(SSMTUNE_CUDA_ARCHS)" \
		-DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" -DSSMTUNE_OUTPUT_DIR="$(CURDIR)/ssmtune"
	cmake --build build/cuda --target _C_cuda --parallel $$(nproc)
	touch $@
