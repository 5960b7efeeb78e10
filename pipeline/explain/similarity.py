"""How alike the tokens of an image become with depth: over-smoothing.

Refiner, arXiv 2106.03714, argues that plain attention makes the tokens of deep layers alike, and that refined maps keep
them apart. Its own measure is not known in detail (no code, no table at hand); this is the usual one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.explain.maps import encoder_layers
from pipeline.models import ImageModel
from pipeline.models.deit import Deit


@torch.no_grad()
def token_similarity(model: ImageModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine between all pairs of different tokens of an image, after every encoder layer.

    The class token is left out. The tokens of a NesT are those of all its blocks together.

    Args:
        model: in evaluation mode.
        images: (B, C, S, S).

    Returns:
        Logits (B, K), and the similarities (B, number of layers).
    """
    has_class_token = isinstance(model, Deit) or getattr(model, "cls_token", None) is not None
    kept: list[Tensor] = []
    hooks = [layer.register_forward_hook(partial(_keep, kept, has_class_token)) for layer in encoder_layers(model)]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, torch.stack(kept, 1)


def mean_cosine(tokens: Tensor) -> Tensor:
    """Of all pairs of different tokens: (B, N, C) -> (B,); NaN where there is one token only.

    By the sum of the unit vectors: |Σ u|² counts every pair twice, and every token once with itself.
    """
    n = tokens.shape[1]
    total = F.normalize(tokens.double(), dim=-1).sum(1).square().sum(-1)
    return ((total - n) / (n * (n - 1)) if n > 1 else torch.full_like(total, torch.nan)).float()


def _keep(kept: list[Tensor], has_class_token: bool, _layer: nn.Module, _inputs: Any, output: Any) -> None:
    x = output[0] if isinstance(output, tuple) else output
    kept.append(mean_cosine((x[:, 1:] if has_class_token else x).flatten(1, -2)))
