"""Which image goes into which shard: a pure function of the listing and the options."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.options import PrepOptions
from data_prep.sources.base import Listing
from data_prep.token_labels import TokenMaps

MIN_SHARDS = 16  # small sets: enough shards for several ranks and loader workers each ...
MIN_SHARD_SAMPLES = 64  # ... as long as a shard is still worth a file
WINDOW_BYTES = 2**30


@dataclass(frozen=True)
class Plan:
    """The shards of one split.

    Attributes:
        shards: source positions of the samples of each shard, in order.
        description: everything the bytes of the shards depend on, as JSON values.
    """

    shards: list[np.ndarray]
    description: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()


def make_plan(
    listing: Listing, kind: str, name: str, split: str, options: PrepOptions, maps: TokenMaps | None = None
) -> Plan:
    """Cut the (shuffled) listing into shards whose sample counts differ by at most one.

    `maps` are stored with the images.

    Positions, not usable images, are dealt out: an image that is dropped leaves every other shard as it is.
    """
    seed = options.seed_of(split)
    order = np.arange(len(listing)) if seed is None else shuffled(listing, seed)
    description = {
        "format": options.format,
        "split": split,
        "options": options.content(split) | ({} if maps is None else {"token_labels": maps.description()}),
        "source": {"kind": kind, "name": name, "images": len(listing), "fingerprint": listing.fingerprint()},
    }
    return Plan(np.array_split(order, shard_count(listing, options)), description)


def shard_count(listing: Listing, options: PrepOptions) -> int:
    """`shard_samples` if given; else about `shard_mb` of source bytes each, but 16 shards unless they get tiny."""
    images = len(listing)
    if options.shard_samples is not None:
        return -(-images // options.shard_samples)
    by_size = -(-int(listing.sizes.sum()) // (options.shard_mb * 1_000_000))
    return min(images, max(1, by_size, min(MIN_SHARDS, images // MIN_SHARD_SAMPLES)))


def shuffled(listing: Listing, seed: int) -> np.ndarray:
    """A random order of the listing, the same on every machine and NumPy release.

    Images that stand alone are permuted uniformly. Where images come in blocks, the blocks are permuted, laid into
    windows of about 1 GiB, and the images permuted within each window: a shard then reads one window or two instead of
    the whole source. A source below 1 GiB is one window, so permuted uniformly.
    """
    generator = np.random.PCG64(seed)  # raw draws of a bit generator are stable; Generator methods promise less
    if listing.blocks is None:
        return np.argsort(generator.random_raw(len(listing)), kind="stable")
    blocks = int(listing.blocks.max()) + 1
    block_order = np.argsort(generator.random_raw(blocks), kind="stable")
    block_bytes = np.bincount(listing.blocks, weights=listing.sizes, minlength=blocks)[block_order]
    window_of = np.empty(blocks, dtype=np.int64)
    window_of[block_order] = (np.cumsum(block_bytes) - block_bytes) // WINDOW_BYTES
    return np.lexsort((generator.random_raw(len(listing)), window_of[listing.blocks]))
