"""Latents as a function of what they are for, so that no process, order or restart changes them."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.hashing import hash64

# Streams of the counter-based generator (see pipeline.hashing): training, fixed ones that are evaluated and drawn.
TRAIN, FIXED = 200, 201


def normal(dim: int, *keys: int | np.ndarray) -> torch.Tensor:
    """(n, dim) float32 of N(0, 1), by Box and Muller's transform of two hashes.

    Args:
        keys: integers, and one (n,) array of integers that tells the rows apart.
    """
    spread = [np.asarray(key)[..., None] for key in keys]
    bits = [hash64(*spread, half, np.arange(dim)) for half in range(2)]
    radius, turn = ((half >> np.uint64(11)).astype(np.float64) * 2.0**-53 for half in bits)
    values = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * turn)
    return torch.from_numpy(np.atleast_2d(values).astype(np.float32))


def fixed_latents(dim: int, seed: int, numbers: np.ndarray) -> torch.Tensor:
    """(n, dim): the latents of images `numbers` of a seed, the same for every generator and at every time."""
    return normal(dim, seed, FIXED, numbers)


def interpolated(first: torch.Tensor, last: torch.Tensor, steps: int) -> torch.Tensor:
    """From one latent to another along the sphere that most latents lie near: (steps, dim), both ends among them.

    Straight lines between Gaussian vectors pass nearer to 0 than the generator has ever seen.
    """
    along = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    a, b = first.double(), last.double()
    angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if angle.sin() < 1e-6:
        return torch.lerp(a, b, along).float()
    weights = torch.sin((1 - along) * angle) / angle.sin(), torch.sin(along * angle) / angle.sin()
    return (weights[0] * a + weights[1] * b).float()
