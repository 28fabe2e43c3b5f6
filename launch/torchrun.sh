#!/usr/bin/env bash
# launch/torchrun.sh RECIPE [key=value ...]: start the workers of this node with torchrun.
# NPROC: number of processes on this node; default: one per GPU, or one on a CPU.
# Several nodes: on each set NNODES, NODE_RANK (0 on the first; Slurm's by default), MASTER_ADDR (the
# first node's) and, if port 29500 is taken, MASTER_PORT.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/environment.sh"
nodes=()
if [[ "${NNODES:-1}" != 1 ]]; then
    first="${MASTER_ADDR:?name the first node}"
    [[ "$first" == *:* ]] && first="[$first]" # IPv6
    nodes=(--nnodes="$NNODES" --node-rank="${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK}}"
        --rdzv-endpoint="$first:${MASTER_PORT:-29500}")
fi
exec python -m dtrain.torchrun --nproc-per-node="${NPROC:-auto}" "${nodes[@]}" -m dtrain.train "$@"
