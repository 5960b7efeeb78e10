#!/usr/bin/env bash
# NesT-T on CIFAR-10: top-1 and minutes of configs/nest/tiny_cifar10_fast.yaml, beside a ResNet-18 that tells what these
# very pictures allow (a JPEG copy costs accuracy). Both see the same samples, augmented alike, in the same order.
#
#   rookery prep cifar10/ shards/cifar10
#   bench/cifar.sh shards/cifar10 [--only resnet,nest] [--seeds 0,1,2] [--epochs 150] [--triton] [--runs runs/cifar_bench]
#                  [--out bench/results/cifar10.json] [--tiny]
#
# Started again after it was ended, it goes on with the NesT, begins anew with the ResNet that was not done, and does
# nothing twice. --tiny takes small models and few steps, on a CPU too, to try the script itself; it writes elsewhere.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
PYTHONPATH=$root exec "$root/.venv/bin/python" "$root/bench/cifar.py" "$@"
