"""Pages of generated images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.generate.features import to_bytes
from pipeline.generate.latents import fixed_latents, interpolated
from pipeline.models.generate import Generator

_GAP, _PAPER, _SMALL = 2, 255, 64


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1] as pictures, grey where C = 1."""
    arrays = to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]


def sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side in rows, small ones at twice their size with their pixels visible."""
    width, height = pictures[0].size
    scale = 2 if width <= _SMALL else 1
    rows = -(-len(pictures) // columns)
    size = (columns * (width * scale + _GAP) + _GAP, rows * (height * scale + _GAP) + _GAP)
    page = Image.new(pictures[0].mode, size, _PAPER if pictures[0].mode == "L" else (_PAPER,) * 3)
    for i, picture in enumerate(pictures):
        left, top = i % columns * (width * scale + _GAP) + _GAP, i // columns * (height * scale + _GAP) + _GAP
        page.paste(picture.resize((width * scale, height * scale), Image.Resampling.NEAREST), (left, top))
    return page


@torch.no_grad()
def generated(generator: Generator, latents: Tensor, batch: int = 64) -> list[Image.Image]:
    """A picture of each latent."""
    device = next(generator.parameters()).device
    parts = (generator.images(part.to(device)) for part in latents.split(batch))
    return [picture for part in parts for picture in to_pictures(part)]


def samples(generator: Generator, count: int, seed: int = 0) -> list[Image.Image]:
    """The first `count` images of a seed."""
    return generated(generator, fixed_latents(generator.latent_dim, seed, np.arange(count)))


def interpolations(generator: Generator, count: int, steps: int, seed: int = 0) -> list[Image.Image]:
    """Between the images of a seed: from the first to the second, the third to the fourth, `steps` images each."""
    return generated(generator, latents_between(generator.latent_dim, count, steps, seed))


def latents_between(dim: int, count: int, steps: int, seed: int = 0) -> Tensor:
    """(count * steps, dim): those of `interpolations`."""
    ends = fixed_latents(dim, seed, np.arange(2 * count))
    return torch.cat([interpolated(ends[2 * i], ends[2 * i + 1], steps) for i in range(count)])
