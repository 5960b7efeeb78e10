"""What the cache of a node has to hold for a run that reads from a store, and what it can."""

from __future__ import annotations

from data_prep.store import is_remote
from launch.workers import Nodes
from pipeline.data.cache_room import room_for
from pipeline.resolve import Resolved
from pipeline.train.forecast import count_node_bytes


def cache_line(run: Resolved, job: Nodes) -> str | None:
    """Where shards are kept on a node and how much of what it reads has room there; None without a store.

    Without `data.cache_gb` the room is that of this machine, which may not be a node of the run.
    """
    data = run.config.data
    places = {place for place in (data.train, data.val) if place is not None and is_remote(place)}
    if not places:
        return None
    node = count_node_bytes(run.order, [shard.bytes for shard in run.train.shards], job.nproc, job.nodes)
    epoch, window = (node.epoch, node.window) if data.train in places else (0, 0)
    evaluation = sum(shard.bytes for shard in run.val.shards) if run.val is not None and data.val in places else 0
    options = data.cache_options()
    room = room_for(options)
    held = f"{options.path}, at most {size_text(room)}{' as its disk is now' if data.cache_gb is None else ''}"
    reads = f"a node reads {size_text(epoch)} an epoch"
    if evaluation:
        reads += f" and {size_text(evaluation)} to evaluate"
    if epoch + evaluation <= room:
        return f"{held}: {reads}, all of which stays there"
    again = f"{held}: {reads}, of which {min(1.0, room / (epoch + evaluation)):.0%} stays there"
    if window <= room:
        return again
    return (
        f"{again}; at any time it reads from {size_text(window)}, which has no room: shards will be fetched again and "
        f"again. Set data.cache_gb to {window / 1e9:.2g} or more, take more nodes, or a smaller data.window"
    )


def size_text(size: int) -> str:
    """`18.9 GB`, `3.0 MB`."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
