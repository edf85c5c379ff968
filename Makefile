# Everything runs in the .venv of this checkout, which the targets make themselves.
#   PYTHON=python3.12   another interpreter for a new .venv
#   UVG_NATIVE=1 or 0   demand or leave out the native core (default: auto)
#   ARGS="..."          passed on to pytest or the bench

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
UVG := $(BIN)/uvg
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
INPUTS = pyproject.toml constraints.txt setup.py CMakeLists.txt cmake/cuda.cmake $(CXX_FILES)
RUNTIME := $(VENV)/.uvg-runtime
DEV := $(VENV)/.uvg-dev
DOCS := $(VENV)/.uvg-docs
BUILD_TOOLS := setuptools pybind11 cmake ninja
CUDA_TOOLS := $(if $(filter Linux,$(shell uname -s)),nvidia-cuda-nvcc nvidia-cuda-cccl)
DEMO := demo_out

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test sanitize emulate lint bench docs clean

help:
	@echo "make demo    generate a video from a sentence, caption it, make both at once; files in $(DEMO)/"
	@echo "make test    build the native core, run the C++ and the Python tests"
	@echo "make sanitize  the C++ tests under ASan and UBSan, then under TSan"
	@echo "make emulate   the C++ tests of the AVX-512 kernels where the CPU has no AVX-512"
	@echo "make lint    ruff, clang-format, codespell, mypy at the versions of constraints.txt"
	@echo "make bench   time the ops against their peers"
	@echo "make docs    build the documentation into site/"
	@echo "make clean   remove what was built (the .venv stays)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed, got: $$($(PYTHON) --version 2>&1); set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module (Debian: apt-get install python3-venv); or set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# $(call install,EXTRAS,CMAKE_ARGS,TOOLS): the package in place with its pinned dependencies, the native core where it builds.
define install
@echo "Installing uvg_engine$(1) into $(VENV) (the first time takes minutes)"
@$(PIP) install -qq --disable-pip-version-check -c constraints.txt $(BUILD_TOOLS) $(3)
@UVG_BUILD_DIR=build/native UVG_CMAKE_ARGS="$(2)" $(PIP) install -qq --disable-pip-version-check \
  --no-build-isolation -c constraints.txt -e '.$(1)'
@$(BIN)/python -m uvg_engine.backends.native
@touch $@
endef

$(RUNTIME): $(INPUTS) | $(BIN)/python
	$(call install,,-DUVG_TESTS=OFF)

$(DEV): $(INPUTS) | $(BIN)/python
	$(call install,[dev],-DUVG_TESTS=ON,$(CUDA_TOOLS))
	@touch $(RUNTIME)

$(DOCS): $(DEV)
	$(call install,[docs],-DUVG_TESTS=ON,$(CUDA_TOOLS))
	@touch $(RUNTIME) $(DEV) $@

# Seeds out of 14 that show what the model can do; how often it does: uvg_engine/embedded/digits/MODEL_CARD.md.
demo: $(RUNTIME)
	@mkdir -p $(DEMO)
	$(UVG) generate "a red seven moving right, fast" -o $(DEMO)/seven.mp4 --trajectory $(DEMO)/seven.png --seed 10
	$(UVG) caption $(DEMO)/seven.mp4 --seed 1
	$(UVG) joint "a green three moving up, slowly" -o $(DEMO)/joint.mp4 --trajectory $(DEMO)/joint.png --seed 14
	@echo "Done. Look at the videos $(DEMO)/seven.mp4 and $(DEMO)/joint.mp4;"
	@echo "how they came out of noise, each step's frames side by side: $(DEMO)/seven.png and $(DEMO)/joint.png"

test: $(DEV)
	@if $(BIN)/python -c 'import uvg_engine._cpu' 2>/dev/null; then \
	  $(BIN)/ctest --test-dir build/native --output-on-failure --no-tests=error; \
	else echo "No native core here: its C++ tests are left out."; fi
	$(BIN)/python -m pytest -q $(ARGS)

# Without the CUDA simulator's test: its threads are stacks that it switches by hand, which sanitizers take for errors.
sanitize: $(DEV)
	@for kind in address,undefined thread; do \
	  dir=build/sanitize-$${kind%%,*}; \
	  $(BIN)/cmake -S . -B $$dir -G Ninja -DUVG_PYTHON=OFF -DUVG_TESTS=ON -DUVG_SANITIZE=$$kind \
	    -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g1" -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja >/dev/null && \
	  $(BIN)/ninja -C $$dir --quiet && \
	  $(BIN)/ctest --test-dir $$dir --output-on-failure --no-tests=error -E 'isa_symbols|test_sim' || exit 1; \
	done

# The kernels of AVX-512 on an x86 CPU that has AVX2 alone: the C++ tests with every intrinsic as a loop.
emulate: $(DEV)
	@for kind in avx512 avx512_bf16; do \
	  dir=build/emulate-$$kind; \
	  $(BIN)/cmake -S . -B $$dir -G Ninja -DUVG_PYTHON=OFF -DUVG_TESTS=ON -DUVG_EMULATE=$$kind -DCMAKE_BUILD_TYPE=None \
	    -DCMAKE_CXX_FLAGS=-O1 -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja >/dev/null && \
	  $(BIN)/ninja -C $$dir --quiet && \
	  $(BIN)/ctest --test-dir $$dir --output-on-failure --no-tests=error -E 'isa_symbols|test_sim' || exit 1; \
	done

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/codespell
	$(BIN)/mypy

bench: $(DEV)
	$(BIN)/python -m bench $(ARGS)

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Done: site/index.html"

clean:
	rm -rf build dist site $(DEMO) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f uvg_engine/_cpu.*.so uvg_engine/_cuda.*.so $(RUNTIME) $(DEV) $(DOCS)
	find uvg_engine kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
