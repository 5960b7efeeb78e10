#!/usr/bin/env bash
# HVT on whole nodes, as many as asked for; docs/slurm.md tells more.
#
#   sbatch [--nodes=4] [--time=24:00:00] slurm/train_hvt.sh [CONFIG] [key=value ...]
#   sbatch --array=0-4 slurm/train_hvt.sh                 # seeds 0 to 4
#
#SBATCH --job-name=hvt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=configs/hvt/s_1_imagenet.yaml
if [[ $# -gt 0 && $1 != *=* && $1 != -* ]]; then
  config=$1
  shift
fi

# The environment of the checkout that the job was submitted from, else the one that was active then.
export PATH="$PWD/.venv/bin:$PATH"
command -v rookery >/dev/null || {
  echo "no rookery command: submit from the checkout after 'make setup', or with an environment that has it" >&2
  exit 2
}
exec rookery train "$config" "$@" --on-allocation
