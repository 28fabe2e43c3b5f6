#!/usr/bin/env bash
#SBATCH --job-name=qwen3.5-35b-a3b-lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=500G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --comment=dtrain
# Qwen3.5-35B-A3B, LoRA on every expert, one node of 8 GPUs, sharded among them.
# Options of sbatch override those above; arguments are keys of the recipe:
#   sbatch --account=me --partition=gpu slurm/qwen3.5-35b-a3b-lora.sh model.base=/models/qwen3.5-35b-a3b
DTRAIN_RECIPE="${DTRAIN_RECIPE:-qwen3.5-35b-a3b-lora}"
DTRAIN_HOME="${DTRAIN_HOME:-$SLURM_SUBMIT_DIR}" # the checkout: submit from it, or say where it is
source "$DTRAIN_HOME/slurm/job.sh" # ends in the supervisor
echo "error: DTRAIN_HOME=$DTRAIN_HOME is not a checkout: submit from it, or set DTRAIN_HOME" >&2
exit 2
