#!/usr/bin/env bash
# Everything that needs a GPU, most important first, in under ten minutes:
#
#     benchmarks/gpu.sh [folder for results, benchmarks/results by default]
#
# Needs what is imported below and nothing else: no network, no installation, no virtual environment. Each part has its own
# time limit, log and JSON, so that a run that is cut off still tells something. Ends non-zero if any part failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-benchmarks/results}")
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
failed=()

part() { # name, seconds, command ...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "=== $name (at most $limit s): $*"
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$DEVICE-$name.log"
  local status=${PIPESTATUS[0]}
  echo "=== $name: status $status after $((SECONDS - start)) s"
  [ "$status" -eq 0 ] || failed+=("$name ($status)")
}

# Nothing is worth starting where this fails.
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv || exit 1
$PYTHON - <<'CHECK' || exit 1
import sys
import torch, triton
assert torch.cuda.is_available(), "torch sees no CUDA device"
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

part bounds 120 "$PYTHON" -m pytest tests/ops -m gpu -q -x --maxfail=20 -k "triton and (bfloat16 or float32)"
measure features 120 --op sequence_features --op token_logprobs --kind peaked --shape qwen3-1.7b-8192
measure lse 60 --op sequence_features_lse --kind peaked --shape qwen3-1.7b-8192
measure backward 60 --op logprobs_backward --kind peaked --shape qwen3-1.7b-8192
measure groups 20 --op g2rl_advantages
part tests 100 "$PYTHON" -m pytest tests/ops -m gpu -q --maxfail=20
measure large 60 --op sequence_features --kind peaked --shape qwen3-4b-32768 --shape llama3-8b-32768
measure peers 60 --peers --op token_logprobs --op sequence_features --kind peaked --shape qwen3-1.7b-8192
part step 60 "$PYTHON" -m benchmarks.e2e --json "$OUT/$DEVICE-step.json"

echo "=== results in $OUT after $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
  echo "=== failed: ${failed[*]}"
  exit 1
fi
