#!/bin/bash
# Trains on several nodes by accelerate, as a file of examples/launching/ says:
#   sbatch --nodes=4 examples/slurm/train_accelerate.sh examples/launching/fsdp2.yaml examples/run_pretraining.py …
#SBATCH --job-name=train
#SBATCH --output=%x-%j.log
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
processes=$((SLURM_NNODES * ${PROCESSES_PER_NODE:-$SLURM_GPUS_ON_NODE}))
# srun gives each node its number, which is read there and not here.
# shellcheck disable=SC2016
exec srun bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch --config_file "$1" \
    --num_machines "$SLURM_NNODES" --num_processes "$processes" \
    --main_process_ip "${nodes[0]}" --main_process_port "${MASTER_PORT:-29500}" "${@:2}"
