"""One shard, start to finish: read its images, check them, write them, record it. Runs in a worker process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from data_prep.betonshard import BetonShardWriter
from data_prep.images import UnusableImage, make_usable
from data_prep.manifest import BadImage, Shard
from data_prep.options import PrepOptions
from data_prep.shardwriter import ShardWriter
from data_prep.sources.base import Item, Reader
from data_prep.state import Record, SplitState
from data_prep.tarshard import TarShardWriter
from data_prep.token_labels import TokenMaps

WRITERS: dict[str, type[ShardWriter]] = {"webdataset": TarShardWriter, "ffcv": BetonShardWriter}


@dataclass(frozen=True)
class ShardTask:
    """What a shard is to hold."""

    file: str
    items: list[Item]


@dataclass(frozen=True)
class ShardBuilder:
    """Everything about a split that its shards share; pickled once per worker."""

    state: SplitState
    plan: str
    reader: Reader
    options: PrepOptions
    maps: TokenMaps | None = None

    def build(self, task: ShardTask, on_image: Callable[[int], None]) -> Record:
        """Make one shard and publish it; `on_image(1)` is called after every image.

        Raises:
            UserError: the source can't be read, or the shard can't be written.
        """
        shard_file, index = self.state.scratch / task.file, self.state.scratch / f"{task.file}.idx"
        with self.state.writing(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata: what matters here raises
            writer = WRITERS[self.options.format](shard_file, index, len(task.items))
            try:
                quarantine = self._fill(writer, task, on_image)
                writer.close()
                shard = Shard(task.file, writer.samples, writer.bytes, writer.sha256, writer.index_sha256)
                record = Record(self.plan, shard, writer.index_bytes, quarantine)
                self.state.publish(record, shard_file, index)
                return record
            finally:
                writer.abort()
                shard_file.unlink(missing_ok=True)
                index.unlink(missing_ok=True)

    def _fill(self, writer: ShardWriter, task: ShardTask, on_image: Callable[[int], None]) -> list[BadImage]:
        quarantine, options = [], self.options
        for item, data in zip(task.items, self.reader.read(task.items), strict=True):
            try:
                store_raw = partial(options.stores_raw, item.key) if options.format == "ffcv" else None
                image = make_usable(
                    data, options.resize, options.quality, options.max_resolution, store_raw, options.marks_kept
                )
                tokens = None if self.maps is None else self.maps.read(item)
            except UnusableImage as error:
                quarantine.append(BadImage(item.name, str(error), "dropped"))
            else:
                writer.add(item.key, image, item.label, tokens)
                if image.repair is not None:
                    quarantine.append(BadImage(item.name, *image.repair))
            on_image(1)
        return quarantine
