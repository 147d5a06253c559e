#!/usr/bin/env bash
# Start a command of the package on N processes of this machine: on N of its GPUs or, without any, on its CPU.
#   launch/start.sh accel_distill.generate N --config run.yaml [section.key=value ...]
# generate.sh and train.sh are its short forms. ACCELERATE_CONFIG=FILE uses that configuration of accelerate,
# for example one of configs/accelerate/, with N processes; without it the user's own default is not used.
#
# Why not just `accelerate launch --num_processes N`: without a GPU it starts one process, and says nothing.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
module=$1
processes=${2:-}

fail() {
  echo "error: $1" >&2
  exit 2
}

[[ $processes =~ ^[1-9][0-9]*$ ]] ||
  fail "expected a number of processes, found '$processes'; usage: launch/${module##*.}.sh N --config FILE [section.key=value ...]"
shift 2

cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
python=$root/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3) || fail "no .venv and no python3; run launch/setup.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# A wrong run file costs one sentence here, and not a launch with a traceback for each process.
"$python" -m accel_distill check "$@"

if [ -n "${ACCELERATE_CONFIG:-}" ]; then
  [ -f "$ACCELERATE_CONFIG" ] || fail "ACCELERATE_CONFIG: no such file: $ACCELERATE_CONFIG"
  how=(--config_file "$ACCELERATE_CONFIG" --num_processes "$processes")
else
  # A Ctrl-C while torch is imported ends it without a traceback.
  gpus=$("$python" -c 'import signal; signal.signal(2, signal.SIG_DFL); import torch; print(torch.cuda.device_count())')
  if [ "$gpus" -gt 0 ] && [ "$processes" -gt "$gpus" ]; then
    fail "$processes processes asked for, and $gpus GPUs visible; expected at most one process for each"
  fi
  if [ "$gpus" -eq 0 ] && [ "$processes" -gt 4 ] && [ "$processes" -gt $((2 * cores)) ]; then
    fail "$processes processes asked for, and no GPU and $cores cores here, and each process loads a model of its own; expected at most one for each core"
  fi
  if [ "$processes" -eq 1 ]; then
    if [ "$gpus" -gt 1 ]; then # one process would spread over all of them (DataParallel)
      export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
      CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
    fi
    exec "$python" -m "$module" "$@"
  fi
  if [ "$gpus" -eq 0 ]; then # --multi_gpu then means several processes, and this variable that they use gloo
    export ACCELERATE_USE_CPU=true
  fi
  how=(--multi_gpu --num_processes "$processes" --num_machines 1 --main_process_port 0
    --mixed_precision no --dynamo_backend no)
fi

if [ -z "${OMP_NUM_THREADS:-}" ]; then # accelerate would set 1
  export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
fi
echo "starting $processes $([ "$processes" -eq 1 ] && echo process || echo processes) of $module" >&2
exec "$python" "$root/launch/quiet_launch.py" --quiet "${how[@]}" -m "$module" "$@"
