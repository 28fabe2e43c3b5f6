#!/usr/bin/env bash
# launch/deepspeed.sh RECIPE [key=value ...]: start the workers of this node with deepspeed.
# The recipe chooses the engine, also under this launcher.
# NPROC: number of processes; default: one per GPU, or one on a CPU.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/environment.sh"
NPROC="${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
export TOKENIZERS_PARALLELISM=false
exec deepspeed --no_local_rank --num_accelerators "$NPROC" --master_port "$port" \
    --module dtrain.train "$@"
