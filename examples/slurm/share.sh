#!/bin/bash
# Computes one share, as a task of an array: sbatch --array=3,17-19 examples/slurm/share.sh 64 unicoder-vl mine …
#SBATCH --job-name=share
#SBATCH --output=%x-%A_%a.log
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail
shares=$1
shift
exec "$@" --share "$SLURM_ARRAY_TASK_ID/$shares"
