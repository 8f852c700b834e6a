# One virtual environment for everything, made on first use and refreshed only when what it holds has changed.
#   make dev        create it and install the package with its extras
#   make demo       and run the demonstration; DATA=folder takes a data folder of one's own, CUDA=1 builds the CUDA kernels too (nvcc 11.8 or newer)
#   make test       and run the tests; make test-all runs those that take minutes too
#   make sanitize   run the tests of the ops and of a step, CUDA kernels emulated, against a build that watches memory and arithmetic (gcc)
#   make gpu-check  on a machine with a GPU: build the CUDA kernels, test and measure them, into benchmarks/results/ or OUT=folder.
#                   A PYTHON that holds a torch with CUDA and what a build needs is taken as it is: no network, nothing installed
#   make lint       check style;  make bench  measure everything, into benchmarks/results/
#   make docs       the pages and the reference of the API as a site, into build/docs
PYTHON ?= python3
VENV ?= .venv
CUDA ?= 0
DATA ?=
OUT ?= benchmarks/results
# Of pyproject.toml; make test-all EXTRAS=cli,test,export,ray runs the tests of what is exported and of Ray Data too.
EXTRAS ?= cli,test
# ON: a warning of the compiler fails the build.
WERROR ?= OFF
# More for pip, such as the index to take torch from.
PIP_FLAGS ?=

# CMake looks for nvcc where PATH says, or takes what CUDACXX names.
ifeq ($(CUDA),1)
NVCC := $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
ifneq ($(NVCC),)
export CUDACXX ?= $(NVCC)
endif
endif

BIN := $(VENV)/bin
STRICT := --config-settings=cmake.define.PCL_WERROR=$(WERROR)
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_FLAGS)
INSTALLED := $(VENV)/.installed-cuda-$(CUDA)
SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE $(shell find cmake csrc pcl_ext -type f ! -name '*.so' ! -name '*.pyc')
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: dev demo test test-all sanitize lint docs bench gpu-check gpu-check-installed
.DELETE_ON_ERROR:

dev: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/pcl demo $(if $(DATA),--data "$(DATA)")

test: $(INSTALLED)
	$(BIN)/pytest

# The trainers of docs/trainers: nothing of them is large, and they take the torch that is there.
test-all: test $(VENV)/.trainers
	timeout 2400 $(BIN)/pytest -m slow

# A build and a target folder of its own. The interpreter is not built with the sanitizers, so their libraries come first,
# with the C++ library, whose exceptions they follow; torch and Python leak at exit by design; each object of Python's is
# a block of its own.
SANITIZE := $(CURDIR)/build/sanitize
WATCH = LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc PYTHONPATH=$(SANITIZE)/site

sanitize: $(SANITIZE)/.installed
	$(WATCH) $(BIN)/pytest --capture=sys python_tests/ops python_tests/model/test_step_on_cuda.py

$(SANITIZE)/.installed: $(SOURCES) $(INSTALLED)
	$(PIP) --no-build-isolation --no-deps --upgrade --target $(SANITIZE)/site \
		--config-settings=build-dir=$(SANITIZE)/objects --config-settings=cmake.build-type=RelWithDebInfo \
		--config-settings=cmake.define.PCL_SANITIZE=ON --config-settings=cmake.define.PCL_CUDA=OFF $(STRICT) .
	touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run_all.py

gpu-check:
	@if $(PYTHON) benchmarks/gpu_check.py --build --ready; then \
		$(PYTHON) benchmarks/gpu_check.py --build --out "$(OUT)"; \
	else \
		echo "so $(VENV) is made, which holds it"; \
		$(MAKE) gpu-check-installed; \
	fi

gpu-check-installed: $(VENV)/.torch
	$(BIN)/python benchmarks/gpu_check.py --ready
	$(MAKE) dev CUDA=1
	$(BIN)/python benchmarks/gpu_check.py --out "$(OUT)"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lint: constraints.txt | $(BIN)/python
	$(PIP) ruff clang-format
	touch $@

$(VENV)/.docs: constraints.txt | $(BIN)/python
	$(PIP) mkdocs-material "mkdocstrings[python]"
	touch $@

$(VENV)/.trainers: constraints.txt $(VENV)/.torch
	$(PIP) lightning transformers accelerate
	touch $@

$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch
	touch $@

$(VENV)/.build: $(VENV)/.torch
	$(PIP) scikit-build-core nanobind cmake ninja
	touch $@

$(INSTALLED): $(SOURCES) $(VENV)/.build
	$(PIP) --no-build-isolation $(STRICT) --config-settings=cmake.define.PCL_CUDA=$(if $(filter 1,$(CUDA)),ON,OFF) ".[$(EXTRAS)]"
	rm -f $(VENV)/.installed-cuda-*
ifeq ($(CUDA),1)
	@ls $(VENV)/lib/python*/site-packages/pcl_ext/_cuda.*so >/dev/null 2>&1 || { echo "CUDA=1 built no CUDA kernels:" \
		"they need nvcc 11.8 or newer, on PATH, in /usr/local/cuda/bin or named by CUDACXX (now '$$CUDACXX')" >&2; exit 1; }
endif
	touch $@
