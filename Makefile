# make demo    trains a small language model on real text and shows what the dynamic mask saved (TEXT=path: your own text)
# make test    builds and runs every test
# Each sets up all it needs in $(VENV), once. PYTHON=python3.12 takes another Python (from 3.10), CXX=clang++ another compiler.
PYTHON ?= python3
VENV ?= .venv
BUILD ?= build
JOBS ?= $(shell nproc)

# A wheel that is built once serves every torch from here on; make test loads it under this one and under the newest.
OLDEST_TORCH := 2.10

bin := $(abspath $(VENV))/bin
oldest := $(VENV)-torch-$(OLDEST_TORCH)
pip_install := -m pip install --quiet --disable-pip-version-check
engine_files := $(shell find include src cmake CMakeLists.txt -type f)
package_files := $(engine_files) $(shell find python -type f -name '*.py') pyproject.toml
cpp_files = $(shell find include src tests/cpp examples/cpp benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cuh')
python_files := python tests/python examples benchmarks docs

.PHONY: demo test test-cpp test-python test-kernels test-wheel test-sanitizers test-address test-thread kernels lint format
.PHONY: wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(bin)/python examples/train_language_model.py $(if $(TEXT),--text "$(TEXT)")

test: lint test-cpp test-python test-kernels test-wheel test-sanitizers

# Setting up: the tools and what the package depends on, then the package itself, built against the torch in $(VENV).
$(VENV)/tools: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer, please: make PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(bin)/python $(pip_install) --upgrade pip
	$(bin)/python $(pip_install) cmake ninja "scikit-build-core>=0.11" "torch>=$(OLDEST_TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/tools $(package_files)
	$(bin)/python $(pip_install) --no-build-isolation --config-settings=build-dir=$(BUILD)/package ".[demo,lint,test,transformers]"
	touch $@

test-cpp: $(VENV)/tools
	$(bin)/cmake -S . -B $(BUILD)/cpp -G Ninja -D CMAKE_MAKE_PROGRAM=$(bin)/ninja
	$(bin)/cmake --build $(BUILD)/cpp --parallel $(JOBS)
	$(bin)/ctest --test-dir $(BUILD)/cpp --parallel $(JOBS) --output-on-failure

test-python: $(VENV)/installed
	$(bin)/python -m pytest -n 2
	TRITON_INTERPRET=1 $(bin)/python -m pytest -n 2 -k triton tests/python/test_triton.py tests/python/test_backends.py

# The CUDA kernels compile, and without spills: those that between them have each pair of options, and all. No GPU is needed.
test-kernels: $(VENV)/installed
	rm -rf $(BUILD)/kernels
	FLASH_DMATTN_CACHE_DIR=$(BUILD)/kernels $(bin)/flash-dmattn precompile --arch sm_80 sm_90a sm_120 --covering --jobs $(JOBS)
	rm -rf $(BUILD)/kernels
kernels: $(VENV)/installed
	$(bin)/flash-dmattn precompile --arch sm_80 sm_86 sm_90a sm_120 --jobs $(JOBS)

# Sanitizers see the engine and its C++ tests.
test-sanitizers: test-address test-thread
test-address: sanitizers := address,undefined
test-thread: sanitizers := thread
test-address test-thread: $(VENV)/tools
	$(bin)/cmake -S . -B $(BUILD)/$@ -G Ninja -D CMAKE_MAKE_PROGRAM=$(bin)/ninja -D FLASH_DMATTN_SANITIZE=$(sanitizers)
	$(bin)/cmake --build $(BUILD)/$@ --parallel $(JOBS)
	$(bin)/ctest --test-dir $(BUILD)/$@ --parallel $(JOBS) --output-on-failure

# A wheel as pip builds it for anybody, in an environment of its own.
wheel: $(BUILD)/wheel/built
$(BUILD)/wheel/built: $(VENV)/tools $(package_files)
	rm -rf $(BUILD)/wheel
	$(bin)/python -m pip wheel --quiet --no-deps --wheel-dir $(BUILD)/wheel .
	touch $@

# The wheel was built with the newest torch; here it runs under the oldest.
test-wheel: $(BUILD)/wheel/built
	test -d $(oldest) || $(PYTHON) -m venv $(oldest)
	$(oldest)/bin/python $(pip_install) "torch==$(OLDEST_TORCH).*" "$$(echo $(BUILD)/wheel/*.whl)[test]"
	$(oldest)/bin/python $(pip_install) --force-reinstall --no-deps $(BUILD)/wheel/*.whl
	$(oldest)/bin/python -m pytest tests/python/test_api.py tests/python/test_operators.py

lint: $(VENV)/installed
	$(bin)/ruff check $(python_files)
	$(bin)/ruff format --check $(python_files)
	$(bin)/clang-format --dry-run --Werror $(cpp_files)
	$(bin)/mypy
	$(bin)/python benchmarks/report.py --check

format: $(VENV)/installed
	$(bin)/ruff check --fix $(python_files)
	$(bin)/ruff format $(python_files)
	$(bin)/clang-format -i $(cpp_files)

clean:
	rm -rf $(BUILD) $(VENV) $(oldest)
