"""Our data order for FFCV's own loader, which then shows a model the same samples per step, and can be resumed."""

from __future__ import annotations

import numpy as np

from pipeline.data.order import DataOrder
from pipeline.errors import UserError


def ffcv_indices(order: DataOrder, epoch: int, rank: int = 0, world_size: int = 1, first: int = 0) -> np.ndarray:
    """What process `rank` of `world_size` reads in an epoch, for `indices` of an `ffcv.loader.Loader`.

    With `order=OrderOption.SEQUENTIAL`, `batch_size=order.batch // world_size` and `distributed=False` its batches are
    those of the steps from `epoch * order.steps_per_epoch + first` on. docs/data.md has the whole call.

    Args:
        order: of a split that is one shard: FFCV opens one file.
        first: steps of the epoch that were done before.

    Returns:
        (n,) int64 positions in the file.

    Raises:
        UserError: there are several shards, or `world_size` does not divide the lanes.
    """
    if len(order.shard_samples) != 1:
        raise UserError(
            f"FFCV's loader opens one file, here are {len(order.shard_samples)} shards; "
            f"prepare them again with --shard-samples {order.num_samples}"
        )
    start = epoch * order.steps_per_epoch
    steps = range(start + first, start + order.steps_per_epoch)
    return np.concatenate([np.empty(0, np.int64), *(order.step(step, rank, world_size).samples for step in steps)])
