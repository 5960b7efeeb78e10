#!/usr/bin/env bash
# The loader beside others, on a folder of class folders with real pictures: crop and flip, and the recipe of NesT, on
# pictures of 300 and of 400 px (short side, quality 90) and on those of the source as they are; crop and flip also on
# those of the source with restart markers. Small sets are repeated to 4,000 samples.
#
#   bench/loader.sh PICTURES [RESULTS]
set -euo pipefail
pictures=$(realpath "${1:?name a folder with class folders of pictures}")
results=$(realpath "${2:-$(dirname "$0")/results}")
rookery=$(realpath "$(dirname "$0")/../.venv/bin/rookery" --no-symlinks)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"  # so that the commands in the results name no folder of this machine

total=$(find "$pictures" -type f | wc -l)
copies=$(((4000 + total - 1) / total))
for ((copy = 0; copy < copies; copy++)); do
  for class in "$pictures"/*/; do
    folder=pictures/$(basename "$class")
    mkdir -p "$folder"
    for file in "$class"*; do
      ln -s "$file" "$folder/$copy-$(basename "$file")"
    done
  done
done
"$rookery" prep pictures 300 --split train --resize 300 --quality 90
"$rookery" prep pictures 400 --split train --resize 400 --quality 90
"$rookery" prep pictures marked --split train --restart-markers
"$rookery" prep pictures original --split train
for what in crop_300 nest_300 crop_original nest_original crop_400 nest_400 crop_marked; do
  "$rookery" bench loader "${what#*_}/train" --recipe "${what%_*}" --out "loader_$what.json"
  mv "loader_$what.json" "$results"
done
