#!/usr/bin/env bash
# ImageNet's archives to shards, on one node; docs/data.md tells more.
#
#   sbatch slurm/prep_imagenet.sh [FOLDER] [OUT] [options of rookery prep]
#
# FOLDER (data/imagenet) holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz;
# OUT is shards/imagenet. Interrupted at any moment, the same command goes on.
#
#SBATCH --job-name=prep
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

folder=data/imagenet out=shards/imagenet
if [[ $# -gt 0 && $1 != -* ]]; then
  folder=$1
  shift
fi
if [[ $# -gt 0 && $1 != -* ]]; then
  out=$1
  shift
fi

# The environment of the checkout that the job was submitted from, else the one that was active then.
export PATH="$PWD/.venv/bin:$PATH"
command -v rookery >/dev/null || {
  echo "no rookery command: submit from the checkout after 'make setup', or with an environment that has it" >&2
  exit 2
}

# Before the time limit: end the work cleanly and go back into the queue.
again=false child=0
trap 'again=true; kill -TERM "$child"' USR1
trap 'kill -TERM "$child"' TERM INT

run() {
  local status=0
  "$@" &
  child=$!
  wait "$child" || status=$?
  # A signal ends the wait, not the work.
  while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
  done
  if [[ $again == true && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
  fi
  [[ $status -eq 0 ]] || exit "$status"
}

run rookery prep "$folder/ILSVRC2012_img_train.tar" "$out" --split train "$@"
run rookery prep "$folder/ILSVRC2012_img_val.tar" "$out" --split val \
  --devkit "$folder/ILSVRC2012_devkit_t12.tar.gz" "$@"
run rookery verify "$out"
