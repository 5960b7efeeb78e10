"""Dense label maps as TokenLabeling's teacher would write them, made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

SHAPE = (2, 3, 4, 5)


def label_map(
    seed: int, classes: int = 3, dtype: torch.dtype = torch.float16, shape: tuple[int, ...] = SHAPE
) -> torch.Tensor:
    """A map whose classes are a permutation in every cell."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(5, 3, shape[1:])
    named = np.argsort(generator.random((classes, *shape[2:])), axis=0)[: shape[1]]
    return torch.from_numpy(np.stack([logits, named])).to(dtype)


def make_maps(root: Path, images: Path, classes: int = 3, shape: tuple[int, ...] = SHAPE) -> Path:
    """A map for every image of class folders, as `generate_label.py` names them."""
    for number, image in enumerate(sorted(images.rglob("*.jpg"))):
        path = root / image.parent.name / (image.name.split(".")[0] + ".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(label_map(number, classes, shape=shape), path)
    return root
