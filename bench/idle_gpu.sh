#!/usr/bin/env bash
# Run a command as if this machine had an H200, one that computes nothing: to see whether the command works there, and
# how much memory it takes. See bench/idle_gpu/__init__.py.
#
#   bench/idle_gpu.sh rookery bench model nest_tiny timm:nest_tiny_jx --phase train --batch 128
#
# It is compiled into build/idle_gpu the first time, by gcc and with the headers that come with PyTorch.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
settings=$(cd "$root" && .venv/bin/python -m bench.idle_gpu "$root/build/idle_gpu")
readarray -t settings <<< "$settings"
PATH="$root/.venv/bin:$PATH" exec env "${settings[@]}" "$@"
