#!/usr/bin/env bash
# A sweep on the nodes of one job, as many as asked for; docs/sweeps.md tells more.
#
#   sbatch --nodes=4 [--time=24:00:00] slurm/sweep.sh configs/sweep/NAME.yaml [key=value ...]
#
# Ray runs on all nodes as long as the job does, and asks for a token that only this job has. Before the time limit all
# trials save and the job goes back into the queue.
#
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# The environment of the checkout that the job was submitted from, else the one that was active then.
export PATH="$PWD/.venv/bin:$PATH"
command -v rookery >/dev/null || {
  echo "no rookery command: submit from the checkout after 'make setup', or with an environment that has it" >&2
  exit 2
}
exec rookery sweep "$@" --on-allocation
