"""What a user can choose about a preparation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

WRITE_MODES = ("jpg", "raw", "proportion", "smart")


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
        restart_markers: add restart markers to JPEGs that are kept: the same pixels, decoded faster in part. Where
            images are shrunk, the small ones that are kept get them in any case, as the others have them too.
        max_resolution: ffcv: shrink images whose long side is longer than this to this.
        write_mode: ffcv: `jpg`, `raw`, `proportion` or `smart`; None means `jpg`.
        compress_probability: ffcv, `proportion`: share of the images that is stored as JPEG; None means 0.5.
        smart_threshold: ffcv, `smart`: images with more bytes of pixels than this are stored as JPEG; None means
            786,432, which is 512 x 512 pixels.
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
    restart_markers: bool = False
    max_resolution: int | None = None
    write_mode: str | None = None
    compress_probability: float | None = None
    smart_threshold: int | None = None
    token_labels: Path | None = None
    max_bad: int | None = None
    workers: int | None = None
    overwrite: bool = False
    repair: bool = False

    def __post_init__(self) -> None:
        for name in ("shard_samples", "shard_mb", "resize", "max_resolution", "smart_threshold", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{flag(name)} is {value}, it must be at least 1")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}, it must lie between 1 and 100")
        if self.max_bad is not None and self.max_bad < 0:
            raise UserError(f"--max-bad is {self.max_bad}, it must be at least 0")
        if self.shuffle_seed < 0:
            raise UserError(f"--shuffle-seed is {self.shuffle_seed}, it must be at least 0")
        self._check_ffcv()

    def _check_ffcv(self) -> None:
        if self.format != "ffcv":
            for name in ("max_resolution", "write_mode", "compress_probability", "smart_threshold"):
                if getattr(self, name) is not None:
                    raise UserError(f"{flag(name)} is an option of --format ffcv; leave it out, or choose that format")
            return
        if self.token_labels is not None:
            raise UserError(
                "--token-labels: a .beton has no place for label maps; use --format webdataset, or leave them out"
            )
        if self.write_mode not in (None, *WRITE_MODES):
            raise UserError(f"--write-mode {self.write_mode}: no such mode; there are {', '.join(WRITE_MODES)}")
        for name, mode in (("compress_probability", "proportion"), ("smart_threshold", "smart")):
            if getattr(self, name) is not None and self.write_mode != mode:
                raise UserError(f"{flag(name)} is for --write-mode {mode}; leave it out, or choose that mode")
        if self.compress_probability is not None and not 0 <= self.compress_probability <= 1:
            raise UserError(f"--compress-probability is {self.compress_probability}, it must lie between 0 and 1")

    def stores_raw(self, key: str, width: int, height: int) -> bool:
        """Whether a `.beton` holds this sample as pixels; always the same for the same sample and size."""
        if self.write_mode == "proportion":
            draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
            return draw >= self._compress_probability
        if self.write_mode == "smart":
            return 3 * width * height <= self._smart_threshold
        return self.write_mode == "raw"

    @property
    def marks_kept(self) -> bool:
        """Whether JPEGs that are kept get restart markers."""
        return self.restart_markers or self.resize is not None or self.max_resolution is not None

    @property
    def _compress_probability(self) -> float:
        return 0.5 if self.compress_probability is None else self.compress_probability

    @property
    def _smart_threshold(self) -> int:
        return 3 * 512 * 512 if self.smart_threshold is None else self.smart_threshold

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
            **({"restart_markers": True} if self.marks_kept else {}),
            **(self._ffcv_content() if self.format == "ffcv" else {}),
        }

    def _ffcv_content(self) -> dict[str, Any]:
        return {
            "max_resolution": self.max_resolution,
            "write_mode": self.write_mode or "jpg",
            "compress_probability": self._compress_probability if self.write_mode == "proportion" else None,
            "smart_threshold": self._smart_threshold if self.write_mode == "smart" else None,
        }

    def tolerated(self, images: int) -> int:
        """How many of `images` may be dropped before the preparation fails."""
        return max(10, images // 1000) if self.max_bad is None else self.max_bad


def flag(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"
