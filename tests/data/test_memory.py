"""Loader processes need no more memory in the twentieth epoch than in the fifth."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from pipeline.data.augment.settings import AugmentConfig, MixConfig, RandomErasingConfig
from pipeline.data.batches import _LOADERS
from pipeline.data.fast.transform import FastTransform
from pipeline.data.loader import Batches, StepDataset
from pipeline.data.order import DataOrder
from pipeline.data.shards import ShardSet

EPOCHS, WORKERS = 20, 2


def test_memory_is_bounded_and_flat(digits: Path) -> None:
    shards = ShardSet(digits / "train")
    order = DataOrder([shard.samples for shard in shards.manifest.shards], seed=0, batch=96, lanes=12)
    augment = AugmentConfig.model_validate({"normalize": "half", "random_erasing": RandomErasingConfig(prob=0.5)})
    mix = MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mode="sample", label_smoothing=0.1)
    dataset = StepDataset(shards, order, FastTransform(augment, 96, 1), mix, 96, 1, 12, rank=0, world_size=1)
    epoch = order.steps_per_epoch
    used: list[dict[int, int]] = []
    others = private_memory().keys()  # of tests before, on their way out
    for step, _ in enumerate(Batches(dataset, range(EPOCHS * epoch), WORKERS, 2, torch.device("cpu"))):
        if (step + 1) % epoch == 0 and step + 1 < EPOCHS * epoch:  # at the very end they leave
            used.append({pid: size for pid, size in private_memory().items() if pid not in others})
    early, late = used[4], used[-1]
    assert early.keys() == late.keys() and len(late) == WORKERS  # the same processes from the first step to the last
    for pid, memory in late.items():
        assert memory < early[pid] * 1.05 + 8 * 2**20, (early, late)
        assert memory < 400 * 2**20


def private_memory() -> dict[int, int]:
    """Bytes that each living loader process has for itself, without what it shares with its fork server."""
    found = {}
    for process in list(_LOADERS):
        if process.is_alive():
            found[process.pid] = psutil.Process(process.pid).memory_full_info().uss
    return found
