#!/bin/bash
# Trains on several nodes by torchrun: sbatch --nodes=4 examples/slurm/train.sh examples/run_pretraining.py --output_dir …
#SBATCH --job-name=train
#SBATCH --output=%x-%j.log
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# A process for each GPU, unless PROCESSES_PER_NODE says another number.
# The first node is told that it is: torchrun's own rendezvous leaves that to the names of machines, which may have several.
# shellcheck disable=SC2016
exec srun bash -c 'exec torchrun --node_rank "$SLURM_NODEID" "$@"' torchrun --nnodes "$SLURM_NNODES" \
    --nproc_per_node "${PROCESSES_PER_NODE:-gpu}" --master_addr "${nodes[0]}" --master_port "${MASTER_PORT:-29500}" "$@"
