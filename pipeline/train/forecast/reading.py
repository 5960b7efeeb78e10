"""What processes and nodes read in an epoch: lanes, samples, shards and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.order import DataOrder

# Windows of an epoch that are looked at.
_WINDOWS = 64


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


@dataclass(frozen=True)
class NodeBytes:
    """Bytes of the shards that the node which reads most reads from.

    Attributes:
        epoch: in an epoch.
        window: while its lanes are in one window of the shuffle, so again and again: a cache should hold as much.
    """

    epoch: int
    window: int


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


def count_node_bytes(order: DataOrder, shard_bytes: Sequence[int], nproc: int, nodes: int, epoch: int = 0) -> NodeBytes:
    """Look up in the data order what the nodes read, each with `nproc` processes.

    Raises:
        UserError: the processes can't share the lanes.
    """
    world_size = nproc * nodes
    order.check_world_size(world_size)
    sizes = np.asarray(shard_bytes, dtype=np.int64)
    shard = np.searchsorted(np.cumsum(order.shard_samples), order.epoch_lanes(epoch), side="right")
    node = np.arange(order.lanes) % world_size // nproc
    length = {"window": order.window, "full": shard.shape[1], "none": order.chunk}[order.shuffle]
    windows = range(0, shard.shape[1], length)
    windows = windows[:: -(-len(windows) // _WINDOWS)]

    def read(lanes: np.ndarray) -> int:
        return int(sizes[np.unique(lanes)].sum())

    own = [shard[node == each] for each in range(nodes)]
    return NodeBytes(
        max(read(lanes) for lanes in own),
        max(read(lanes[:, start : start + length]) for lanes in own for start in windows),
    )
