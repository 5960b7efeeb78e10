"""What a training step and an evaluation step get.

A training batch is a function of the step alone, so the loader is torch's `DataLoader` over a range of steps: loader
processes may come and go, and a resumed run starts its range where the last one stopped.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipeline.data.augment.lazy import TIMM, TORCHVISION
from pipeline.data.augment.mixing import MixConfig, MixParams, draw_mix
from pipeline.data.order import DataOrder
from pipeline.data.shards import Sample, ShardSet
from pipeline.errors import UserError
from pipeline.hashing import uniform

_DROP_PATH_STREAM = 101
# What every loader process would import for seconds: the server that they are forked from does it once.
_PRELOAD = [
    __name__,
    "pipeline.data.augment.transforms",
    "torchvision.transforms.functional",
    "timm.data.auto_augment",
]


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
        images: (b, C, H, W) float32, 0 in the padding.
        labels: (b,) int64, 0 in the padding.
        real: (b,) bool, False in the padding that makes all batches equal.
    """

    images: torch.Tensor
    labels: torch.Tensor
    real: torch.Tensor


class _Failed(NamedTuple):
    """A `UserError` on its way out of a loader process, which would otherwise arrive wrapped in a traceback."""

    message: str


def decode(data: bytes, in_chans: int) -> Image.Image:
    """The image of an encoded sample, RGB or greyscale; an alpha channel is dropped.

    Raises:
        UserError: the bytes are no image any more.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            return image.convert("L" if in_chans == 1 else "RGB")
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise nearly every type on damaged bytes
        raise UserError(f"can't be decoded ({error}); check the shards with `rookery verify`") from error


@contextmanager
def _naming(sample: Sample, shards: ShardSet) -> Iterator[None]:
    """Say which sample a mistake is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{shards.directory}: sample {sample.key}: {error}") from error


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
        rank, world_size: this process among those that share the steps.

    Raises:
        UserError: `world_size` does not divide the lanes.
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
        order.check_world_size(world_size)
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
            with _naming(sample, self.shards):
                image = decode(sample.data, self.in_chans)
                images.append(self.transform(image, seed, chosen.epoch, int(index)))
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
        try:
            return self._batch(i)
        except UserError as error:
            return _Failed(str(error))

    def _batch(self, i: int) -> EvalBatch:
        start = (i * self.world_size + self.rank) * self.batch_size
        samples = range(start, min(start + self.batch_size, len(self.shards)))
        images, labels = [], []
        # A process whose share is all padding looks at some image to learn its shape.
        for sample in self.shards.read(samples or range(1)):
            with _naming(sample, self.shards):
                images.append(self.transform(decode(sample.data, self.in_chans)))
            labels.append(sample.label)
        real, missing = len(samples), self.batch_size - len(samples)
        return EvalBatch(
            torch.stack(images[:real] + [torch.zeros_like(images[0])] * missing),
            torch.tensor(labels[:real] + [0] * missing),
            torch.arange(self.batch_size) < real,
        )


class Batches:
    """Iterates a dataset of batches over a range, through loader processes; can be iterated again.

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
            # are; the fork server has no other threads.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(_PRELOAD)
            forkserver.ensure_running()  # its imports go on while the caller sets up the rest
            options = {
                "prefetch_factor": prefetch,
                "multiprocessing_context": context,
                "worker_init_fn": _end_with_the_trainer,
            }
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=positions,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the default one belongs to the training step
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        """The batches in order.

        Raises:
            UserError: a sample can't be used, or a loader process died.
        """
        try:
            for batch in self._loader:
                if isinstance(batch, _Failed):
                    raise UserError(batch.message)
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise UserError(
                f"a loader process died, most likely for want of memory ({error}); lower data.workers or "
                "data.prefetch, or give the job more memory (in a container also more /dev/shm)"
            ) from error


def _end_with_the_trainer(_worker: int) -> None:
    """Make a loader process end when the process it loads for is killed.

    torch's own watch looks at the parent, which here is the fork server, and that waits for its children.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "called in a loader process"

    def follow() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
