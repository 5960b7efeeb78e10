"""Fréchet distance and Inception score of a generator, computed by torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.loader import EvalBatch
from pipeline.errors import UserError
from pipeline.generate.features import FeatureNet, to_bytes
from pipeline.generate.latents import fixed_latents
from pipeline.models.generate import Generator

if TYPE_CHECKING:
    from pipeline.train.distributed import World

_SPLITS = 10


class _AsGiven(nn.Module):
    """Stands where the metrics expect a network: they are handed what ours has seen."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, seen: Tensor) -> Tensor:
        return seen


class Judge:
    """FID (Heusel et al. 2017) against a split, and the Inception score (Salimans et al. 2016) in ten splits.

    Images are judged as they would be written, in 8 bits. The split's side of the distance is computed once.

    Args:
        net: gives features and logits.
        world: this process among the others; both figures are of all processes' images.
    """

    def __init__(self, net: FeatureNet, world: World) -> None:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
            from torchmetrics.image.inception import InceptionScore
        except ImportError as error:
            raise UserError("task=generate evaluates with torchmetrics: pip install 'rookery[generate]'") from error
        self.net, self.world = net, world
        given: Any = _AsGiven(net.num_features)
        self.distance = FrechetInceptionDistance(given, reset_real_features=False).to(world.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the memory for all logits: 200 MB of 50,000 images
            self.score = InceptionScore(given, splits=_SPLITS).to(world.device)
        self.has_split = False

    @torch.no_grad()
    def judge_split(self, batches: Iterable[EvalBatch]) -> None:
        """This process's part of the real images."""
        for batch in batches:
            images = to_bytes(batch.images.to(self.world.device))
            real = batch.real.to(self.world.device)
            self.distance.update(self.net(images).features[real], real=True)
        self.has_split = True

    @torch.no_grad()
    def judge(
        self, generator: Generator, count: int, batch: int, autocast: AbstractContextManager[None]
    ) -> dict[str, float]:
        """Figures of the images of `count` fixed latents, shared among the processes; collective.

        Returns:
            `fid_<network>`, `is_<network>` and `count`.
        """
        self.distance.reset()
        self.score.reset()
        own = np.array_split(np.arange(count), self.world.size)[self.world.rank]
        for start in range(0, len(own), batch):
            latents = fixed_latents(generator.latent_dim, 0, own[start : start + batch]).to(self.world.device)
            with autocast:
                images = generator.images(latents)
            seen = self.net(to_bytes(images))
            self.distance.update(seen.features, real=False)
            self.score.update(seen.logits)
        with torch.random.fork_rng(devices=[]):  # the score shuffles the images before it splits them
            torch.manual_seed(0)
            score = float(self.score.compute()[0])
        return {
            f"fid_{self.net.name}": float(self.distance.compute()),
            f"is_{self.net.name}": score,
            "count": float(count),
        }
