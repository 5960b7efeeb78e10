#!/usr/bin/env bash
# Run a command as if this machine had an H200, one that computes nothing: to see whether the command works there, and
# how much memory it takes. See bench/idle_gpu/__init__.py.
#
#   bench/idle_gpu.sh rookery bench model nest_tiny timm:nest_tiny_jx --phase train --batch 128
#   bench/idle_gpu.sh rookery train configs/demo.yaml name=idle data.val=null train.max_bad_steps=1000
#
# Figures of an evaluation would be 0 / 0 there, so a training goes without one (data.val=null), and its losses may be
# NaN, which it has to bear (train.max_bad_steps). IDLE_GPU_MB=8192 makes the GPU smaller. It is compiled
# below build/idle_gpu the first time, by gcc and with the headers that come with PyTorch.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: $0 COMMAND [ARGUMENT ...]" >&2; exit 2; }
root=$(dirname "$(dirname "$(realpath "$0")")")
settings=$(cd "$root" && .venv/bin/python -m bench.idle_gpu build/idle_gpu) || exit
readarray -t settings <<< "$settings"
PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root" exec env "${settings[@]}" "$@"
