"""Repeated augmentation against the sampler of DeiT and HVT (`RASampler`), which timm carries as `RepeatAugSampler`."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from timm.data.distributed_sampler import RepeatAugSampler

from pipeline.data.order import DataOrder, default_lanes


def official_steps(samples: int, processes: int, per_process: int, epoch: int) -> list[np.ndarray]:
    """Samples of every global step: each process cuts its share into batches and drops the remainder."""
    shares = []
    for rank in range(processes):
        sampler = RepeatAugSampler(range(samples), processes, rank, num_repeats=3)
        sampler.set_epoch(epoch)
        shares.append(np.array(list(sampler)))
    starts = range(0, len(shares[0]) - per_process + 1, per_process)
    return [np.concatenate([share[start : start + per_process] for share in shares]) for start in starts]


def own_order(samples: int, batch: int, shuffle: str = "window") -> DataOrder:
    shards = (samples // 40,) * 39 + (samples - samples // 40 * 39,)
    return DataOrder(shards, 0, batch, default_lanes(batch), shuffle, repeats=3)


@pytest.mark.parametrize("shuffle", ["window", "full"])
@pytest.mark.parametrize(
    ("samples", "processes", "steps", "distinct"),
    [(50_000, 8, 48, 16_384), (50_000, 2, 195, 16_640), (50_000, 1, 390, 16_640)],
)
def test_an_epoch_of_cifar(samples: int, processes: int, steps: int, distinct: int, shuffle: str) -> None:
    official = official_steps(samples, processes, 128, epoch=1)
    order = own_order(samples, processes * 128, shuffle)
    ours = [order.step(order.steps_per_epoch + step).samples for step in range(order.steps_per_epoch)]
    for epoch in (official, ours):
        assert len(epoch) == steps
        presented = Counter(np.concatenate(epoch).tolist())
        assert sum(presented.values()) == steps * processes * 128
        assert len(presented) == distinct
        assert max(presented.values()) == 3


def test_an_epoch_of_imagenet() -> None:
    """1,251 steps of 1,024 with 427,008 distinct images; the official figures in closed form."""
    samples = 1_281_167
    presented = samples // 256 * 256
    order = own_order(samples, 1024)
    assert order.steps_per_epoch == 1251 == presented // 8 // 128
    ours = [order.step(step).samples for step in range(1251)]
    assert sum(map(len, ours)) == 1_281_024 == presented
    assert len(np.unique(np.concatenate(ours))) == 427_008 == presented // 3


def test_copies_share_a_step_but_where_one_ends() -> None:
    """The official sampler cuts 1.3 images of a step of 1,024 apart, lanes cut that many each."""

    def cut(steps: list[np.ndarray]) -> float:
        return float(np.mean([sum(n < 3 for n in Counter(step.tolist()).values()) for step in steps]))

    assert cut(official_steps(50_000, 8, 128, 0)) < 2
    order = own_order(50_000, 1024)
    assert cut([order.step(step).samples for step in range(48)]) < 2 * order.lanes


@pytest.mark.parametrize("shuffle", ["window", "full"])
def test_every_image_is_among_the_third_equally_often(shuffle: str) -> None:
    """Presence of 60 images in 1,200 epochs of 20: the variance over images is binomial, within 5 sigma for each."""
    order = DataOrder((17, 20, 23), 1, 12, 2, shuffle, 8, repeats=3)
    epochs = 1200
    seen = np.zeros(60)
    for epoch in range(epochs):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        present = np.unique(np.concatenate([order.step(step).samples for step in steps]))
        assert len(present) == 20
        seen[present] += 1
    assert np.abs(seen - epochs / 3).max() < 5 * np.sqrt(epochs * (1 / 3) * (2 / 3))
