"""A trainer that ends in the middle of its batches: `python -m tests.data.trainer_that_leaves`."""

from __future__ import annotations

import sys

import torch
from torch.utils.data import Dataset

from pipeline.data.batches import Batches


class Numbers(Dataset):
    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor(i)


if __name__ == "__main__":
    batches = iter(Batches(Numbers(), range(1000), 1, 1, torch.device("cpu")))
    next(batches)
    sys.exit(3)
