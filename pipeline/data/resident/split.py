"""All pictures of a split, decoded."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.data.ahead import fetched_ahead
from pipeline.data.batches import Batches, Failed
from pipeline.data.fast.decode import decode_array
from pipeline.data.shards import ShardSet
from pipeline.data.substitute import BadSample, Retries
from pipeline.errors import UserError

# Of a node's cache, what may be filled before it is needed.
_SHARE = 0.75
_OFF = "set data.resident=false"


class Fault(NamedTuple):
    """What `BadSample` says of a sample."""

    sample: int
    path: str
    reason: str
    mend: str
    key: str
    lost: bool

    def error(self) -> BadSample:
        return BadSample(self.path, self.reason, self.mend, self.key, lost=self.lost)


class ResidentSplit(NamedTuple):
    """A whole split in memory.

    Attributes:
        pictures: (N, C, H, W) uint8, 0 where a sample is bad.
        labels: (N,) int64 on the host.
        faults: bad samples by their position.
    """

    pictures: torch.Tensor
    labels: np.ndarray
    faults: dict[int, Fault]


class _Chunk(NamedTuple):
    """(n, H, W, C) uint8 pictures, H = W = 0 where all are bad; (n,) labels; what is wrong."""

    pixels: torch.Tensor
    labels: torch.Tensor
    faults: list[Fault]


class _Chunks(Dataset):
    """`chunks[i]` are decoded pictures `i * count` and those that follow."""

    def __init__(self, shards: ShardSet, in_chans: int, count: int) -> None:
        self.shards, self.in_chans, self.count = shards, in_chans, count
        self._retries = Retries()

    def __len__(self) -> int:
        return math.ceil(len(self.shards) / self.count)

    def samples_of(self, i: int) -> range:
        return range(i * self.count, min((i + 1) * self.count, len(self.shards)))

    def __getitem__(self, i: int) -> _Chunk | Failed:
        try:
            return self._chunk(self.samples_of(i))
        except UserError as error:
            return Failed.of(error)

    def _chunk(self, samples: range) -> _Chunk:
        pixels, labels, faults = None, np.zeros(len(samples), np.int64), []
        for row, sample in enumerate(samples):
            try:
                picture, labels[row] = self._retries.load(sample, self._decoded)
            except BadSample as error:
                faults.append(Fault(sample, error.path, error.reason, error.mend, error.key, error.lost))
                continue
            if pixels is None:
                pixels = np.zeros((len(samples), *picture.shape), np.uint8)
            if picture.shape != pixels.shape[1:]:
                raise _unequal(self.shards, sample, picture.shape, pixels.shape[1:])
            pixels[row] = picture
        if pixels is None:
            pixels = np.zeros((len(samples), 0, 0, self.in_chans), np.uint8)
        return _Chunk(torch.from_numpy(pixels), torch.from_numpy(labels), faults)

    def _decoded(self, sample: int) -> tuple[np.ndarray, int]:
        return self.shards.tried_twice(sample, lambda: self._decoded_once(sample))

    def _decoded_once(self, sample: int) -> tuple[np.ndarray, int]:
        read = next(self.shards.read([sample]))
        try:
            return decode_array(read.data, self.in_chans, read.shape), read.label
        except UserError as error:
            self.shards.reopen(sample)
            mend = "check the shards with `rookery verify`"
            raise BadSample(self.shards.path_of(sample), str(error), mend, read.key) from error


def decode_split(
    shards: ShardSet, in_chans: int, workers: int, prefetch: int, device: torch.device, count: int = 1024
) -> ResidentSplit:
    """Decode all pictures of a split, by loader processes, into the memory of the device.

    Args:
        count: pictures that a loader process decodes at a time.

    Raises:
        UserError: pictures of several sizes, none that can be decoded, or too many for the device.
    """
    chunks = _Chunks(shards, in_chans, count)
    source = fetched_ahead(chunks, shards, chunks.samples_of, len(chunks), _SHARE)
    pictures: torch.Tensor | None = None
    labels = np.zeros(len(shards), np.int64)
    faults: dict[int, Fault] = {}
    for i, chunk in enumerate(Batches(source, range(len(chunks)), workers, prefetch, torch.device("cpu"))):
        samples, size = chunks.samples_of(i), tuple(chunk.pixels.shape[1:])
        labels[samples.start : samples.stop] = chunk.labels.numpy()
        faults |= {fault.sample: fault for fault in chunk.faults}
        if not size[0]:
            continue
        if pictures is None:
            pictures = _room(shards, size, device)
        if size != (*pictures.shape[2:], pictures.shape[1]):
            first = next(sample for sample in samples if sample not in faults)
            raise _unequal(shards, first, size, (*pictures.shape[2:], pictures.shape[1]))
        pictures[samples.start : samples.stop] = chunk.pixels.to(device).permute(0, 3, 1, 2)
    if pictures is None:
        raise next(iter(faults.values())).error()
    return ResidentSplit(pictures, labels, faults)


def _room(shards: ShardSet, size: tuple[int, ...], device: torch.device) -> torch.Tensor:
    height, width, channels = size
    needed = len(shards) * height * width * channels
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            raise UserError(
                f"{shards.directory}: {len(shards):,} pictures of {width}x{height} take {needed / 1e9:.1f} GB, and "
                f"{device} has {free / 1e9:.1f} GB free; {_OFF}"
            )
    return torch.zeros((len(shards), channels, height, width), dtype=torch.uint8, device=device)


def _unequal(shards: ShardSet, sample: int, size: tuple[int, ...], others: tuple[int, ...]) -> UserError:
    [key] = shards.keys([sample])
    return UserError(
        f"{shards.directory}: sample {key} has {size[1]}x{size[0]} pixels, those before it {others[1]}x{others[0]}: "
        f"data.resident=true keeps pictures of one size; {_OFF}"
    )
