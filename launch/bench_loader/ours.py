"""This project's loader as a contender, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from launch.bench_loader.contender import Contender, Settings
from pipeline.data.augment.mixing import MixConfig, draw_mix
from pipeline.data.augment.settings import AugmentConfig
from pipeline.data.augment.transforms import build_train_transform
from pipeline.data.fast.decode import decode_part
from pipeline.data.fast.transform import FastTransform
from pipeline.data.loader import Batches, StepDataset, drop_path_uniforms
from pipeline.data.order import DataOrder, default_lanes
from pipeline.data.shards import ShardSet

NEST: dict[str, Any] = {
    "crop": {"kind": "rrc", "scale": [0.05, 1.0], "ratio": [0.75, 1.33], "sampler": "side"},
    "interpolation": "bilinear",
    "antialias": False,
    "rand_augment": {"policy": "nest", "layers": 2, "magnitude": 9, "std": 0.5, "prob": 0.5},
    "color_jitter": {"strength": 0.3, "prob": 0.8, "gray_prob": 0.2},
    "random_erasing": {"prob": 0.25, "placement": "clipped"},
}
CROP: dict[str, Any] = {"crop": "rrc", "interpolation": "bilinear", "antialias": False}
SMOOTH: dict[str, Any] = {"crop": "rrc", "interpolation": "bilinear", "antialias": True}
MIX = MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mode="sample", beta="nest_approx", label_smoothing=0.1)


def _dataset(settings: Settings, split: Path, augment: dict[str, Any], compiled: bool = True) -> StepDataset:
    shards = ShardSet(split)
    sizes = tuple(shard.samples for shard in shards.manifest.shards)
    order = DataOrder(sizes, seed=0, batch=settings.batch, lanes=default_lanes(settings.batch))
    build = FastTransform if compiled else build_train_transform
    transform = build(AugmentConfig.model_validate(augment), settings.side, 3)
    mix = MIX if settings.recipe == "nest" else MixConfig()
    # Peers that only crop give 8-bit pictures; with the whole recipe all give finished floats.
    finish = settings.recipe == "nest"
    return StepDataset(shards, order, transform, mix, settings.side, 3, 20, 0, 1, finish=finish)


def _contender(
    name: str, reads: Literal["own", "tars", "betons"], recipe: str, augment: dict[str, Any], compiled: bool = True
) -> Contender:
    def make(settings: Settings) -> Callable[[], Iterator[Any]]:
        dataset = _dataset(settings, getattr(settings.scene, reads), augment, compiled)
        epoch = dataset.order.steps_per_epoch
        started = 0

        def start() -> Iterator[Any]:
            nonlocal started
            steps = range(started * epoch, (started + 1) * epoch)
            started += 1
            return iter(Batches(dataset, steps, settings.workers, settings.prefetch, torch.device("cpu")))

        return start

    return Contender(name, None, reads, (recipe,), make)


OURS = [
    _contender("rookery", "tars", "crop", CROP),
    _contender("rookery, FFCV shards", "betons", "crop", CROP),
    _contender("rookery, antialiased", "own", "crop", SMOOTH),
    _contender("rookery", "tars", "nest", NEST),
    _contender("rookery, FFCV shards", "betons", "nest", NEST),
    _contender("rookery, augment_by=pillow", "own", "nest", NEST, compiled=False),
]


def endless(settings: Settings) -> Iterator[Any]:
    """Batches of the user's own shards, epoch after epoch."""
    dataset = _dataset(settings, settings.scene.own, NEST if settings.recipe == "nest" else CROP)
    return iter(Batches(dataset, range(10**6), settings.workers, settings.prefetch, torch.device("cpu")))


def split(settings: Settings, batches: int = 8) -> dict[str, float]:
    """Milliseconds per image of each part of the work, in this process alone.

    Returns:
        `read`, `decode`, `crop` (straight into the batch), `augment` (RandAugment and colour jitter), `finish`
        (normalisation and erasing, for which a GPU is used where there is one) and `collate` (what else a batch has:
        labels, mixing partners and boxes, numbers for stochastic depth).
    """
    spent = dict.fromkeys(("read", "decode", "crop", "augment", "finish", "collate"), 0.0)
    augment = NEST if settings.recipe == "nest" else CROP
    bare = {key: value for key, value in augment.items() if key not in ("rand_augment", "color_jitter")}
    whole, crop = (FastTransform(AugmentConfig.model_validate(a), settings.side, 3) for a in (augment, bare))
    dataset = _dataset(settings, settings.scene.own, augment)
    images = 0
    for step in range(-1, batches):  # the first one compiles, and fills caches
        chosen = dataset.order.step(max(step, 0))
        clock = _Clock()
        samples = list(dataset.shards.read(chosen.samples))
        reading = clock.lap()
        wanted = [partial(whole.wanted, numbers) for numbers in whole.numbers(0, chosen.epoch, chosen.samples)]
        pictures = [decode_part(s.data, 3, s.shape, part) for s, part in zip(samples, wanted, strict=True)]
        decoding = clock.lap()
        crop(pictures, 0, chosen.epoch, chosen.samples)
        cropping = clock.lap()
        done = whole(pictures, 0, chosen.epoch, chosen.samples)
        augmenting = max(clock.lap() - cropping, 0.0)
        whole.finish.on_host(done.pixels, done.erased)
        finishing = clock.lap()
        torch.tensor([sample.label for sample in samples])
        drop_path_uniforms(0, chosen.epoch, chosen.samples, dataset.drop_paths)
        draw_mix(dataset.mix, 0, step + 1, chosen.lanes, dataset.order.chunk, settings.side)
        if step >= 0:
            images += len(samples)
            laps = (reading, decoding, cropping, augmenting, finishing, clock.lap())
            for name, seconds in zip(spent, laps, strict=True):
                spent[name] += seconds
    return {name: 1000 * seconds / images for name, seconds in spent.items()}


def bytes_per_image(settings: Settings) -> float:
    """Mean stored size of an image."""
    shards = ShardSet(settings.scene.own)
    some = np.linspace(0, len(shards) - 1, 200).astype(int)
    return float(np.mean([len(sample.data) for sample in shards.read(some)]))


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        since, self._last = now - self._last, now
        return since
