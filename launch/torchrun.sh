#!/usr/bin/env bash
# launch/torchrun.sh RECIPE [key=value ...]: start the workers of this node with torchrun.
# NPROC: number of processes on this node; default: one per GPU, or one on a CPU.
# Several nodes: set NNODES, MASTER_ADDR and, if port 29500 is taken, MASTER_PORT on each of them.
set -euo pipefail
root="$(dirname "$(dirname "$(readlink -f "$0")")")"
if [[ -z "${VIRTUAL_ENV:-}" && -d "$root/.venv" ]]; then
    PATH="$root/.venv/bin:$PATH"
fi
if [[ "${NNODES:-1}" == 1 ]]; then # loopback and a free port, so that two runs never meet
    rendezvous=(--local-addr=127.0.0.1 --rdzv-endpoint=127.0.0.1:0)
else
    first="${MASTER_ADDR:?name the first node}"
    [[ "$first" == *:* ]] && first="[$first]" # IPv6
    rendezvous=(--nnodes="$NNODES" --rdzv-id="${RDZV_ID:-dtrain}"
        --rdzv-endpoint="$first:${MASTER_PORT:-29500}")
fi
exec python -m dtrain.torchrun --nproc-per-node="${NPROC:-auto}" --rdzv-backend=c10d \
    "${rendezvous[@]}" -m dtrain.train "$@"
