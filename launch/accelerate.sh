#!/usr/bin/env bash
# launch/accelerate.sh ENGINE RECIPE [key=value ...]: start the workers of this node with accelerate.
# ENGINE: ddp, fsdp2, zero2 or zero3; each has a file in launch/accelerate/.
# NPROC: number of processes; default: one per GPU, or one on a CPU.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/environment.sh"
settings="$root/launch/accelerate/${1:-}.yaml"
if [[ $# -lt 2 || ! -f "$settings" ]]; then
    echo "usage: $0 ddp|fsdp2|zero2|zero3 RECIPE [key=value ...]" >&2
    exit 2
fi
shift
NPROC="${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
export TOKENIZERS_PARALLELISM=false
# accelerate's store listens on all interfaces; this one on the loopback.
start="from dtrain.distributed.rendezvous import restrict_stores; restrict_stores()
from accelerate.commands.launch import main; main()"
exec python -c "$start" --config_file "$settings" --num_processes "$NPROC" -m dtrain.train "$@"
