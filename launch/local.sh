#!/usr/bin/env bash
# Several processes on this machine: one per GPU where there are that many, else on the processor's cores.
#   launch/local.sh 2 recipes/quickstart.yaml [key.path=value …]
# Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end the run with exit code 75; the same command resumes it. Plain
# processes rather than torchrun, which turns every exit code into 1 and dies of SIGUSR1 without telling its workers.
set -euo pipefail

if (($# < 2)) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "error: how many processes, and which recipe? launch/local.sh 2 RECIPE.yaml [key.path=value …]" >&2
  exit 2
fi
processes=$1 recipe=$2
shift 2
script=$(dirname "${BASH_SOURCE[0]}")/../recipes/distill.py

read -r gpus port < <(python - <<'PYTHON'
import socket
import torch

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    print(torch.cuda.device_count(), free.getsockname()[1])
PYTHON
) || {
  echo "error: this python has no torch: activate the environment, or: uv run launch/local.sh …" >&2
  exit 2
}
if ((0 < gpus && gpus < processes)) && [[ ${ACCELERATE_USE_CPU:-} != true ]]; then
  echo "error: this machine has $gpus GPUs, not $processes; for its processor's cores put ACCELERATE_USE_CPU=true in front" >&2
  exit 2
fi
if ((gpus < processes)); then
  export ACCELERATE_USE_CPU=true # without it, processes without GPUs do not find each other
fi
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$port WORLD_SIZE=$processes LOCAL_WORLD_SIZE=$processes

asked=false
trap 'asked=true' INT TERM USR1
ranks=()
for ((rank = 0; rank < processes; rank++)); do
  (
    trap '' INT USR1 # until Python listens: what is still starting would die of it
    RANK=$rank LOCAL_RANK=$rank exec python "$script" --config "$recipe" "$@"
  ) &
  ranks+=($!)
done

code=0 deadline=""
while ((${#ranks[@]})); do
  sleep 0.5 || true # a signal ends it
  if $asked; then
    kill -USR1 "${ranks[@]}" 2>/dev/null || true # again and again, since a process may not have listened yet
  fi
  running=()
  for process in "${ranks[@]}"; do
    if kill -0 "$process" 2>/dev/null; then
      running+=("$process")
      continue
    fi
    status=0
    wait "$process" || status=$?
    if ((status != 0 && (code == 0 || code == 75))); then # a failure says more than 75, which asks for a new start
      code=$status
    fi
    if ((status != 0)); then
      deadline=${deadline:-$((SECONDS + 60))} # for the others, which may wait for this one in vain
    fi
  done
  ranks=("${running[@]}")
  if [[ -n $deadline ]] && ((SECONDS > deadline && ${#ranks[@]})); then
    kill -KILL "${ranks[@]}" 2>/dev/null || true
  fi
done
exit "$code"
