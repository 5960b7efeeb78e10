"""What a user can choose about a preparation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError


@dataclass(frozen=True)
class PrepOptions:
    """The options of `rookery prep`.

    Attributes:
        kind: kind of source; None detects it.
        devkit: ILSVRC2012 development kit (archive or extracted folder), which holds the labels of the val tar.
        coarse_labels: CIFAR-100 with its 20 coarse classes instead of the 100 fine ones.
        image_column, label_column: columns of a parquet source; None detects them.
        format: format of the shards.
        shard_samples: samples per shard at most; None takes `shard_mb` instead.
        shard_mb: source megabytes (1e6 bytes) per shard, about; small sets get smaller shards, see `plan.shard_count`.
        shuffle: shuffle the split globally; None means yes for the splits named train*.
        shuffle_seed: seed of that shuffle.
        resize: shrink images whose short side is longer than this to this; None keeps the original bytes.
        quality: JPEG quality wherever an image is encoded again.
        token_labels: directory of dense label maps, which are stored beside the images of splits named train*.
        max_bad: dropped images tolerated; None means 0.1 % of the split, and at least 10.
        workers: worker processes; None takes every usable core. Changes no byte of the result.
        overwrite: replace shards made with other options or from another source.
        repair: hash the finished shards and make the damaged ones again.
    """

    kind: str | None = None
    devkit: Path | None = None
    coarse_labels: bool = False
    image_column: str | None = None
    label_column: str | None = None
    format: str = "webdataset"
    shard_samples: int | None = None
    shard_mb: int = 128
    shuffle: bool | None = None
    shuffle_seed: int = 0
    resize: int | None = None
    quality: int = 90
    token_labels: Path | None = None
    max_bad: int | None = None
    workers: int | None = None
    overwrite: bool = False
    repair: bool = False

    def __post_init__(self) -> None:
        for name in ("shard_samples", "shard_mb", "resize", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}, it must lie between 1 and 100")
        if self.max_bad is not None and self.max_bad < 0:
            raise UserError(f"--max-bad is {self.max_bad}, it must be at least 0")
        if self.shuffle_seed < 0:
            raise UserError(f"--shuffle-seed is {self.shuffle_seed}, it must be at least 0")

    def seed_of(self, split: str) -> int | None:
        """Seed of the global shuffle of a split, None where it keeps the order of the source."""
        shuffle = split.startswith("train") if self.shuffle is None else self.shuffle
        return self.shuffle_seed if shuffle else None

    def maps_of(self, split: str) -> Path | None:
        """Directory of the label maps of a split; evaluation needs none."""
        return self.token_labels if split.startswith("train") else None

    def content(self, split: str) -> dict[str, Any]:
        """The options that change the bytes of a split, as the manifest keeps them."""
        return {
            "shard_samples": self.shard_samples,
            "shard_mb": self.shard_mb if self.shard_samples is None else None,
            "shuffle_seed": self.seed_of(split),
            "resize": self.resize,
            "quality": self.quality,
        }

    def tolerated(self, images: int) -> int:
        """How many of `images` may be dropped before the preparation fails."""
        return max(10, images // 1000) if self.max_bad is None else self.max_bad
