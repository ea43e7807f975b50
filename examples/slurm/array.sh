#!/bin/bash
# Submits a command as an array of shares, and a job that gathers them: examples/slurm/array.sh 64 unicoder-vl mine …
# Options of sbatch for both come from its environment, such as SBATCH_PARTITION and SBATCH_ACCOUNT.
set -euo pipefail
here=$(dirname "$0")
array=$(sbatch --parsable --array="0-$(($1 - 1))" "$here/share.sh" "$@")
# Also after tasks that failed: it then names the shares that are missing, as `sbatch --array` takes them.
sbatch --dependency="afterany:${array%%;*}" "$here/gather.sh" "$@"
