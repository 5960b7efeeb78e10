"""What each process reads in an epoch: lanes, samples and shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.order import DataOrder


@dataclass(frozen=True)
class Reading:
    """Reading of one epoch.

    Attributes:
        lanes: of each process.
        samples: distinct ones that each process reads.
        shards: (fewest, most) that a process reads from.
        opened: shards that processes read from, summed over them; a shard on the border of two lanes counts for both.
    """

    lanes: int
    samples: int
    shards: tuple[int, int]
    opened: int


def count_reading(order: DataOrder, world_size: int, epoch: int = 0) -> Reading:
    """Look up in the data order what every process reads.

    Raises:
        UserError: `world_size` does not divide the lanes.
    """
    order.check_world_size(world_size)
    lanes = order.epoch_lanes(epoch)
    shard = np.searchsorted(np.cumsum(order.shard_samples), lanes, side="right")
    own = [len(np.unique(shard[rank::world_size])) for rank in range(world_size)]
    return Reading(len(lanes) // world_size, lanes[::world_size].size, (min(own), max(own)), sum(own))
