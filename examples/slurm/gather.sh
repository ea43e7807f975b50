#!/bin/bash
# Puts shares together, or names those that are missing: sbatch examples/slurm/gather.sh 64 unicoder-vl mine …
#SBATCH --job-name=gather
#SBATCH --output=%x-%j.log
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --time=04:00:00
set -euo pipefail
shares=$1
shift
exec "$@" --gather "$shares"
