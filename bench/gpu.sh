#!/usr/bin/env bash
# Everything that docs/performance.md needs from a GPU: first that the fast paths compute what the plain ones do, then
# throughput and memory. A file per part is written as soon as it is measured. A call takes nine minutes at most: a part
# that it has no time for is named, for another call with --only. Needs torch and timm alone.
#
#   bench/gpu.sh [--tiny] [--only checks,eager,compiled,...] [--minutes 8.5] [--out bench/results]
#
# The parts are those of NAMES in bench/gpu_parts.py, in their order: what decides most comes first. A fast path that is
# wrong ends it; if it is one of the opt-in kernels, models without them are measured all the same. A part that fails,
# crashes or hangs is tried once more without these, and the others go on in another process.
# Exit status 1: something was wrong or left out.
# --tiny takes small models and pictures, on a CPU too, to try the script itself.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=$root exec timeout 540 "$python" "$root/bench/gpu.py" "$@"
