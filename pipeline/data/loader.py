"""What a training step and an evaluation step get: datasets whose items are whole batches.

A training batch is a function of the step alone, so loader processes may come and go, and a resumed run asks for the
steps from where the last one stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from pipeline.data.augment.finish import Erased
from pipeline.data.augment.mix_token import draw_mix_token
from pipeline.data.augment.mixing import MixConfig, MixParams, draw_mix
from pipeline.data.augment.token_labels import TokenLabelBatch, decode_map
from pipeline.data.augment.transforms import TrainTransform
from pipeline.data.batches import Batches, Failed, empty_to_send
from pipeline.data.fast.decode import decode_image, decode_part
from pipeline.data.fast.transform import FastTransform, Wanted
from pipeline.data.order import DataOrder
from pipeline.data.resident.plan import Plan
from pipeline.data.shards import ShardSet
from pipeline.data.substitute import BadSample, Replaced, Retries, Substitutes
from pipeline.errors import UserError
from pipeline.hashing import uniform

__all__ = ["Batches", "EvalBatch", "EvalDataset", "StepDataset", "TrainBatch"]

_DROP_PATH_STREAM = 101

# Gives the picture of the next sample of a batch, or the part that it is told.
_Load = Callable[..., Any]
# Augmented images, boxes that are still to be erased, and where parts of the images come from.
_Images = tuple[torch.Tensor, Erased | None, np.ndarray | None]


class TrainBatch(NamedTuple):
    """One process's part of a global step.

    Attributes:
        images: (b, C, H, W), augmented: float32 and normalised, or uint8 where that is left to the device; empty with a
            `plan`.
        labels: (b,) int64.
        samples: (b,) int64, positions in the manifest of what is trained on: of the replacement where one is bad.
        drop_path: (b, P) float32 uniforms, one per sample and stochastic-depth branch.
        mix: partners, weights and boxes of mixup and CutMix.
        tokens: label maps; None where the tokens have no labels of their own.
        erased: boxes that the device erases; None where `images` are finished.
        replaced: the bad samples among those that the order asks for; None: all are good.
        plan: what the device does to pictures that it holds; None: `images` come with the batch.
    """

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    drop_path: torch.Tensor
    mix: MixParams
    tokens: TokenLabelBatch | None = None
    erased: Erased | None = None
    replaced: list[Replaced] | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class TokenLabelOptions:
    """How token labels are read.

    Attributes:
        grid: tokens on a side of the model.
        mix_token: draw a MixToken box for every lane chunk.
        swap_axes: read the crop as the official code does, with x and y exchanged.
    """

    grid: int
    mix_token: bool
    swap_axes: bool


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


class Decoded(NamedTuple):
    """A sample that can be used: its key, label, label map if asked for, and picture.

    `picture` is a Pillow image, or a `Part` for compiled loops; None where it was used already.
    """

    key: str
    picture: Any
    label: int
    tokens: torch.Tensor | None


def load_sample(
    shards: ShardSet,
    sample: int,
    in_chans: int,
    tokens: bool = False,
    wanted: Wanted | None = None,
) -> Decoded:
    """Read and decode one sample.

    Args:
        wanted: give a `Part`, as `decode_part` says; None: a Pillow image.

    Raises:
        BadSample: it can't be.
    """
    return shards.tried_twice(sample, lambda: _loaded(shards, sample, in_chans, tokens, wanted))


def _loaded(shards: ShardSet, sample: int, in_chans: int, tokens: bool, wanted: Wanted | None) -> Decoded:
    read = next(shards.read([sample], tokens))
    try:
        picture: Any
        if wanted is None:
            picture = decode_image(read.data, in_chans, read.shape)
        else:
            picture = decode_part(read.data, in_chans, read.shape, wanted)
        maps = None if read.tokens is None else decode_map(read.tokens, shards.manifest)
    except UserError as error:
        shards.reopen(sample)
        mend = "check the shards with `rookery verify`"
        raise BadSample(shards.path_of(sample), str(error), mend, read.key) from error
    return Decoded(read.key, picture, read.label, maps)


def drop_path_uniforms(seed: int, epoch: int, ids: np.ndarray, branches: int) -> torch.Tensor:
    """(b, branches) float32 in [0, 1) for samples `ids` (b,), copies told apart: what decides on stochastic depth."""
    return torch.from_numpy(uniform(seed, _DROP_PATH_STREAM, epoch, ids[:, None], np.arange(branches)))


@contextmanager
def _naming(key: str, shards: ShardSet) -> Iterator[None]:
    """Say which sample a mistake is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{shards.directory}: sample {key}: {error}") from error


class StepDataset(Dataset):
    """`dataset[step]` is the batch that process `rank` of `world_size` trains on in global step `step`.

    Args:
        shards: the training split.
        order: which samples when.
        transform: whole batches (`FastTransform`), or (image, seed, epoch, index) to a (C, H, W) tensor; a pure
            function; with `tokens` a `FastTransform` or a `TrainTransform`.
        mix: mixup and CutMix.
        img_size: side of the images that `transform` returns.
        in_chans: image channels.
        drop_paths: stochastic-depth branches of the model.
        rank, world_size: this process among those that share the steps.
        tokens: read the label maps of the shards; None: don't.
        finish: give floats; False: a `FastTransform` leaves normalisation and erasing to the device.
        replace_bad: put another sample in the place of one that can't be used, rather than fail.

    Raises:
        UserError: `world_size` does not divide the lanes.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: DataOrder,
        transform: FastTransform | Callable[[Image.Image, int, int, int], torch.Tensor],
        mix: MixConfig,
        img_size: int,
        in_chans: int,
        drop_paths: int,
        rank: int,
        world_size: int,
        tokens: TokenLabelOptions | None = None,
        finish: bool = True,
        replace_bad: bool = False,
    ) -> None:
        order.check_world_size(world_size)
        self.shards, self.order, self.transform, self.mix = shards, order, transform, mix
        self.img_size, self.in_chans, self.drop_paths = img_size, in_chans, drop_paths
        self.rank, self.world_size, self.tokens, self.finish = rank, world_size, tokens, finish
        self._samples: Substitutes[Decoded] = Substitutes(order.shard_samples, order.seed, replace_bad)

    def __getitem__(self, step: int) -> TrainBatch | Failed:
        try:
            return self._batch(step)
        except UserError as error:
            return Failed.of(error)

    def _batch(self, step: int) -> TrainBatch:
        order, seed = self.order, self.order.seed
        chosen = order.step(step, self.rank, self.world_size)
        # Copies of a sample in repeated augmentation are told apart as if they were further samples.
        ids = chosen.samples + chosen.copies * order.num_samples
        used: list[int] = []
        samples: list[Decoded] = []
        replaced: list[Replaced] = []

        def load(sample: int, wanted: Wanted | None = None) -> Any:
            # A replacement takes a bad sample's place, and with it all that is drawn there.
            position, loaded, fault = self._samples.load(sample, chosen.epoch, partial(self._load, wanted=wanted))
            if fault is not None:
                replaced.append(Replaced(sample, fault.file, fault.key, fault.reason, position, loaded.key))
            used.append(position)
            samples.append(loaded._replace(picture=None))
            return loaded.picture

        loads: list[_Load] = [partial(load, sample) for sample in chosen.samples.tolist()]
        augment = self._fast if isinstance(self.transform, FastTransform) else self._plain
        images, erased, warps = augment(loads, samples, chosen.epoch, ids)
        return TrainBatch(
            images,
            torch.tensor([sample.label for sample in samples]),
            torch.tensor(used),
            drop_path_uniforms(seed, chosen.epoch, ids, self.drop_paths),
            draw_mix(self.mix, seed, step, chosen.lanes, order.chunk, self.img_size),
            self._tokens(step, chosen.lanes, samples, warps),
            erased,
            replaced or None,
        )

    def _load(self, sample: int, wanted: Wanted | None) -> Decoded:
        return load_sample(self.shards, sample, self.in_chans, self.tokens is not None, wanted)

    def _fast(self, loads: list[_Load], samples: list[Decoded], epoch: int, ids: np.ndarray) -> _Images:
        assert isinstance(self.transform, FastTransform)
        batch, side, channels = len(loads), self.img_size, self.in_chans
        pixels = empty_to_send((batch, side, side, channels), torch.uint8) if not self.finish else None
        done = self.transform(
            loads,
            self.order.seed,
            epoch,
            ids,
            trace=self.tokens is not None,
            swap_axes=self.tokens is not None and self.tokens.swap_axes,
            naming=lambda i: _naming(samples[i].key, self.shards),
            out=None if pixels is None else pixels.numpy(),
        )
        if pixels is None:
            images = empty_to_send((batch, channels, side, side), torch.float32)
            return self.transform.finish.on_host(done.pixels, done.erased, images), None, done.warps
        return pixels.permute(0, 3, 1, 2), done.erased, done.warps

    def _plain(self, loads: list[_Load], samples: list[Decoded], epoch: int, ids: np.ndarray) -> _Images:
        assert not isinstance(self.transform, FastTransform)
        images, warps = [], []
        for load, index in zip(loads, ids.tolist(), strict=True):
            picture = load()
            with _naming(samples[-1].key, self.shards):
                if self.tokens is None:
                    images.append(self.transform(picture, self.order.seed, epoch, index))
                    continue
                assert isinstance(self.transform, TrainTransform), "only it knows where pixels come from"
                pixels, warp = self.transform.traced(picture, self.order.seed, epoch, index, self.tokens.swap_axes)
                images.append(pixels)
                warps.append(warp)
        return torch.stack(images), None, np.stack(warps) if warps else None

    def _tokens(
        self, step: int, lanes: np.ndarray, samples: list[Decoded], warps: np.ndarray | None
    ) -> TokenLabelBatch | None:
        if self.tokens is None:
            return None
        assert warps is not None, "asked for with the maps"
        maps = [sample.tokens for sample in samples if sample.tokens is not None]
        mix = None
        if self.tokens.mix_token:
            mix = draw_mix_token(self.order.seed, step, lanes, self.order.chunk, self.tokens.grid)
        return TokenLabelBatch(torch.stack(maps), torch.from_numpy(warps), mix)


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
        self._retries = Retries()

    def __len__(self) -> int:
        return math.ceil(len(self.shards) / (self.batch_size * self.world_size))

    def __getitem__(self, i: int) -> EvalBatch | Failed:
        try:
            return self._batch(i)
        except BadSample as error:
            return Failed(f"{error}; evaluation leaves no sample out: figures over others would not compare")
        except UserError as error:
            return Failed.of(error)

    def samples_of(self, i: int) -> range:
        """The samples of batch `i`; fewer than `batch_size`, or none, at the end."""
        start = (i * self.world_size + self.rank) * self.batch_size
        return range(start, min(start + self.batch_size, len(self.shards)))

    def _batch(self, i: int) -> EvalBatch:
        samples = self.samples_of(i)
        images, labels = [], []
        # A process whose share is all padding looks at some image to learn its shape.
        for sample in samples or range(1):
            loaded = self._retries.load(sample, self._load)
            with _naming(loaded.key, self.shards):
                images.append(self.transform(loaded.picture))
            labels.append(loaded.label)
        real, missing = len(samples), self.batch_size - len(samples)
        return EvalBatch(
            torch.stack(images[:real] + [torch.zeros_like(images[0])] * missing),
            torch.tensor(labels[:real] + [0] * missing),
            torch.arange(self.batch_size) < real,
        )

    def _load(self, sample: int) -> Decoded:
        return load_sample(self.shards, sample, self.in_chans)
