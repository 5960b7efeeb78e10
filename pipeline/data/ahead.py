"""Fetching shards before they are needed: the order of the samples is known, so the coming shards are too."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from pipeline.data.files import CachedFiles
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError

# Positions that are looked at, at most.
_HORIZON = 4096
# After a failure the store is left alone for a moment. Reading tells of the failure, if it needs the shard.
_AFTER_FAILURE = 5.0
# The thread ends when nothing was asked for so long.
_IDLE_SECONDS = 30.0
# To look for every coming shard costs milliseconds.
_PAUSE_SECONDS = 0.5


def fetched_ahead(
    dataset: Dataset, shards: ShardSet, samples_of: Callable[[int], np.ndarray | range], end: int, share: float
) -> Dataset:
    """A dataset of batches, and a thread in each process that reads it, which fetches the shards of the next ones.

    Args:
        dataset: maps a position to a batch.
        shards: what it reads; those of this machine need no fetching, and the dataset is returned as it is.
        samples_of: the samples that a position reads; called from the thread, so it shares no cache with the dataset.
        end: where positions end.
        share: part of the cache that the coming shards may fill, over all trainers of the node.
    """
    return FetchedAhead(dataset, shards, samples_of, end, share) if isinstance(shards.files, CachedFiles) else dataset


class FetchedAhead(Dataset):
    """Use `fetched_ahead`."""

    def __init__(
        self,
        dataset: Dataset,
        shards: ShardSet,
        samples_of: Callable[[int], np.ndarray | range],
        end: int,
        share: float,
    ) -> None:
        assert isinstance(shards.files, CachedFiles)
        self.dataset, self._files, self._described = dataset, shards.files, shards.manifest.shards
        self._share = share / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        sizes = [(shard.samples, shard.bytes) for shard in shards.manifest.shards]
        self._plan = ComingShards(samples_of, sizes, end)
        self._position = 0
        self._moved = threading.Event()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, position: int) -> Any:
        self._position = position
        self._moved.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._fetch, name="fetches shards", daemon=True)
            self._thread.start()
        return self.dataset[position]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_moved", "_thread")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _moved=threading.Event(), _thread=None)

    def _fetch(self) -> None:
        while self._moved.wait(_IDLE_SECONDS):
            self._moved.clear()
            try:
                while self._fetch_one():
                    pass
            except (UserError, OSError):
                time.sleep(_AFTER_FAILURE)
            time.sleep(_PAUSE_SECONDS)

    def _fetch_one(self) -> bool:
        """Fetch the first shard that is missing; all before it count as used, so that they stay."""
        budget = int(self._share * self._files.cache.limit())
        return any(self._files.fetch(self._described[shard]) for shard in self._plan.after(self._position, budget))


class ComingShards:
    """Which shards the positions from a given one on read, those that are needed first coming first.

    Every position is looked at once, as long as positions grow.

    Args:
        samples_of: the samples that a position reads.
        shards: samples and bytes of every shard.
        end: where positions end.
    """

    def __init__(
        self, samples_of: Callable[[int], np.ndarray | range], shards: Sequence[tuple[int, int]], end: int
    ) -> None:
        self._samples_of, self._end = samples_of, end
        self._ends = np.cumsum([samples for samples, _ in shards])
        self._bytes = [size for _, size in shards]
        self._last: dict[int, int] = {}  # shard -> the last position looked at that reads it
        self._begun = self._looked = 0

    def after(self, position: int, budget: int) -> list[int]:
        """Shards that `position` and those after it read, as many as `budget` bytes hold; whole positions only."""
        if position < self._begun or position > self._looked:
            self._last, self._looked = {}, position
        self._begun = position
        self._last = {shard: last for shard, last in self._last.items() if last >= position}
        held = sum(self._bytes[shard] for shard in self._last)
        while self._looked < min(self._end, position + _HORIZON) and len(self._last) < len(self._bytes):
            needed = list(self._shards_of(self._looked))
            held += sum(self._bytes[shard] for shard in needed if shard not in self._last)
            if held > budget:
                break
            self._last |= dict.fromkeys(needed, self._looked)
            self._looked += 1
        return list(self._last)

    def _shards_of(self, position: int) -> Iterator[int]:
        samples = np.asarray(self._samples_of(position))
        shards, first = np.unique(np.searchsorted(self._ends, samples, side="right"), return_index=True)
        yield from (int(shard) for shard in shards[np.argsort(first)])
