"""The compiled path behind loader processes: the same batches, in memory that is sent without a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from pipeline.data.augment.settings import AugmentConfig, MixConfig
from pipeline.data.fast.transform import FastTransform
from pipeline.data.loader import Batches, StepDataset, TrainBatch
from pipeline.data.order import DataOrder
from pipeline.data.shards import ShardSet
from tests.data.test_loader import CPU, assert_equal

SIDE = 96


class _Shared(Dataset):
    """Whether the images of a batch lie in shared memory where they are made."""

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> Any:
        batch = self.dataset[step]
        assert isinstance(batch, TrainBatch)
        return torch.tensor([batch.images.is_shared()])


def fast_dataset(split: Path, finish: bool) -> StepDataset:
    shards = ShardSet(split)
    order = DataOrder(tuple(shard.samples for shard in shards.manifest.shards), seed=5, batch=32, lanes=4)
    augment = AugmentConfig.model_validate(
        {
            "crop": "rrc",
            "normalize": "half",
            "rand_augment": {"policy": "nest", "layers": 2, "magnitude": 9, "std": 0.5, "prob": 0.5},
            "random_erasing": {"prob": 0.5, "mode": "pixel"},
        }
    )
    transform = FastTransform(augment, SIDE, 1)
    return StepDataset(shards, order, transform, MixConfig(), SIDE, 1, 3, 0, 1, finish=finish)


@pytest.mark.parametrize("finish", [True, False])
def test_loader_processes_change_nothing(digits: Path, finish: bool) -> None:
    dataset = fast_dataset(digits / "train", finish)
    expected = [dataset[step] for step in range(4)]
    for step, batch in enumerate(Batches(dataset, range(4), 2, 2, CPU)):
        sent = expected[step]
        assert isinstance(sent, TrainBatch) and batch.images.dtype == (torch.float32 if finish else torch.uint8)
        assert_equal(batch[:6], sent[:6])
        if not finish:
            assert batch.erased.boxes.tolist() == sent.erased.boxes.tolist() and len(batch.erased.boxes)
            assert batch.erased.noise.tolist() == sent.erased.noise.tolist() and len(batch.erased.noise)
    # They are copied by nobody on the way: the loader process writes where the trainer reads.
    assert [shared.item() for shared in Batches(_Shared(dataset), range(2), 1, 2, CPU)] == [True, True]
    assert not expected[0].images.is_shared()
