"""What a training step and an evaluation step get.

A training batch is a function of the step alone, so the loader is torch's `DataLoader` over a range of steps: loader
processes may come and go, and a resumed run starts its range where the last one stopped.
"""

from __future__ import annotations

import io
import math
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipeline.data.augment.mixing import MixConfig, MixParams, draw_mix
from pipeline.data.order import DataOrder
from pipeline.data.shards import Sample, ShardSet
from pipeline.errors import UserError
from pipeline.hashing import uniform

_DROP_PATH_STREAM = 101


class TrainBatch(NamedTuple):
    """One process's part of a global step.

    Attributes:
        images: (b, C, H, W) float32, augmented and normalised.
        labels: (b,) int64.
        samples: (b,) int64, positions in the manifest.
        drop_path: (b, P) float32 uniforms, one per sample and stochastic-depth branch.
        mix: partners, weights and boxes of mixup and CutMix.
    """

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    drop_path: torch.Tensor
    mix: MixParams


class EvalBatch(NamedTuple):
    """One process's part of an evaluation step.

    Attributes:
        images: (b, C, H, W) float32.
        labels: (b,) int64, 0 in the padding.
        real: (b,) bool, False in the padding that makes all batches equal.
    """

    images: torch.Tensor
    labels: torch.Tensor
    real: torch.Tensor


class _Failed(NamedTuple):
    """A `UserError` on its way out of a loader process, which would otherwise arrive wrapped in a traceback."""

    message: str


def decode(sample: Sample, in_chans: int, shards: ShardSet) -> Image.Image:
    """The image of a sample, RGB or greyscale.

    Raises:
        UserError: the bytes are no image any more.
    """
    try:
        with Image.open(io.BytesIO(sample.data)) as image:
            return image.convert("L" if in_chans == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{shards.directory}: sample {sample.key!r} can't be decoded ({error}); "
            f"run `rookery verify {shards.directory}`"
        ) from error


class StepDataset(Dataset):
    """`dataset[step]` is the batch that process `rank` of `world_size` trains on in global step `step`.

    Args:
        shards: the training split.
        order: which samples when.
        transform: (image, seed, epoch, index) to a (C, H, W) tensor; a pure function.
        mix: mixup and CutMix.
        img_size: side of the images that `transform` returns.
        in_chans: image channels.
        drop_paths: stochastic-depth branches of the model.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: DataOrder,
        transform: Callable[[Image.Image, int, int, int], torch.Tensor],
        mix: MixConfig,
        img_size: int,
        in_chans: int,
        drop_paths: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.shards, self.order, self.transform, self.mix = shards, order, transform, mix
        self.img_size, self.in_chans, self.drop_paths = img_size, in_chans, drop_paths
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> TrainBatch | _Failed:
        try:
            return self._batch(step)
        except UserError as error:
            return _Failed(str(error))

    def _batch(self, step: int) -> TrainBatch:
        order, seed = self.order, self.order.seed
        chosen = order.step(step, self.rank, self.world_size)
        # Copies of a sample in repeated augmentation are told apart as if they were further samples.
        ids = chosen.samples + chosen.copies * order.num_samples
        images, labels = [], []
        for sample, index in zip(self.shards.read(chosen.samples), ids, strict=True):
            images.append(self.transform(decode(sample, self.in_chans, self.shards), seed, chosen.epoch, int(index)))
            labels.append(sample.label)
        branches = np.arange(self.drop_paths)
        return TrainBatch(
            torch.stack(images),
            torch.tensor(labels),
            torch.from_numpy(chosen.samples),
            torch.from_numpy(uniform(seed, _DROP_PATH_STREAM, chosen.epoch, ids[:, None], branches)),
            draw_mix(self.mix, seed, step, chosen.lanes, order.chunk, self.img_size),
        )


class EvalDataset(Dataset):
    """`dataset[i]` is batch `i` of process `rank`: every sample once, the last batches padded to equal size."""

    def __init__(
        self,
        shards: ShardSet,
        transform: Callable[[Image.Image], torch.Tensor],
        in_chans: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.shards, self.transform, self.in_chans = shards, transform, in_chans
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        return math.ceil(len(self.shards) / (self.batch_size * self.world_size))

    def __getitem__(self, i: int) -> EvalBatch | _Failed:
        start = (i * self.world_size + self.rank) * self.batch_size
        samples = range(min(start, len(self.shards)), min(start + self.batch_size, len(self.shards)))
        # A process whose share is all padding still needs an image of the right shape.
        padded = [*samples, *[0] * (self.batch_size - len(samples))]
        try:
            read = list(self.shards.read(padded))
            images = torch.stack([self.transform(decode(sample, self.in_chans, self.shards)) for sample in read])
        except UserError as error:
            return _Failed(str(error))
        real = torch.arange(self.batch_size) < len(samples)
        return EvalBatch(images, torch.tensor([s.label for s in read]) * real, real)


class Batches:
    """Iterates a dataset of batches over a range, through loader processes.

    Args:
        dataset: maps a position to a batch.
        positions: which batches, in order.
        workers: loader processes; 0 loads in this process.
        prefetch: batches that each of them prepares ahead.
        device: batches are put into pinned memory for a GPU.
    """

    def __init__(self, dataset: Dataset, positions: range, workers: int, prefetch: int, device: torch.device) -> None:
        options: dict[str, Any] = {}
        if workers:
            # A fork would copy the locks of this process's other threads (tracking, gloo, CUDA) in whatever state they
            # are; the fork server has no other threads, and has the imports done once.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            options = {"prefetch_factor": prefetch, "worker_init_fn": _one_thread, "multiprocessing_context": context}
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=positions,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if isinstance(batch, _Failed):
                raise UserError(batch.message)
            yield batch


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
