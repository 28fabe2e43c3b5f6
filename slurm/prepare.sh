#!/usr/bin/env bash
#SBATCH --job-name=prepare
#SBATCH --array=1-8
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
#SBATCH --comment=dtrain
# Tokenizes and packs a recipe's data without GPUs, in an array whose tasks share the work. Training
# must see the same cache (DTRAIN_CACHE). A killed task loses one shard for each of its processes:
# submit it or the whole array again, or train; finished shards are kept.
#   sbatch --account=me --array=1-32 slurm/prepare.sh model.base=/models/llama-3.1-70b
DTRAIN_RECIPE="${DTRAIN_RECIPE:-7b-lora}"
DTRAIN_HOME="${DTRAIN_HOME:-$SLURM_SUBMIT_DIR}" # the checkout: submit from it, or say where it is
source "$DTRAIN_HOME/slurm/python.sh" &&
    exec "${container[@]}" "$python" -m dtrain data prepare "$DTRAIN_RECIPE" "$@"
echo "error: DTRAIN_HOME=$DTRAIN_HOME is not a checkout: submit from it, or set DTRAIN_HOME" >&2
exit 2
