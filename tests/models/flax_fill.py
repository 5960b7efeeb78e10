"""Weights for golden logits: every official tensor filled by a formula of its name and the index of its elements."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Kernels and position embeddings 0.08·v, biases 0.1·v, LayerNorm scales 1 + 0.1·v; v in [-1, 1), C order."""
    return {name: _fill(name, shape) for name, shape in shapes.items()}


def _fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    t = np.sin(12.9898 * np.arange(1, np.prod(shape) + 1) + len(name)) * 43758.5453
    v = (2 * (t - np.floor(t)) - 1).reshape(shape)
    if name.endswith("scale"):
        return 1 + 0.1 * v
    return (0.1 if name.endswith("bias") else 0.08) * v


def golden_image(size: int) -> Tensor:
    """One float64 image (1, 3, size, size): sin(0.013·i) over the elements in the order height, width, channel."""
    flat = torch.arange(size * size * 3, dtype=torch.float64)
    return torch.sin(0.013 * flat).reshape(1, size, size, 3).permute(0, 3, 1, 2)
