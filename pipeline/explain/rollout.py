"""Attention roll-out: which patches the output of a model with one token sequence has drawn from.

Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, arXiv 2005.00928: with Ā_l the mean over the
heads of the maps of layer l and I for the residual path,

    R_0 = I,    R_l = (Ā_l + I) / 2 · R_{l-1},    every row of Ā_l made to sum to 1.

Where the sequence gets shorter (HVT), R is multiplied by what the pool does: a row per pooled token, which says from
which tokens it was taken. It knows no class.

Refined maps (Refiner) have entries below 0, and rows that sum to anything: here the absolute values count, since a
value enters the sum with the size of its entry. That is our choice; the paper has no roll-out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.explain.maps import LayerMaps, kept_maps
from pipeline.models import ImageModel
from pipeline.models.deit import Deit
from pipeline.models.pool import TokenPool
from pipeline.models.tokens import Pooling, TokenTransformer


class Rollout(NamedTuple):
    """The roll-out of B images.

    Attributes:
        logits: (B, K).
        before: (B, N', N) after the last layer: a row for each of its tokens, a column for each of the first layer's.
            The class token, if any, is the first of both. Every row sums to 1. Of maps before refinement.
        after: the same of refined maps where there are any; None for a model that refines none.
    """

    logits: Tensor
    before: Tensor
    after: Tensor | None


def check_rollout(model: ImageModel) -> ImageModel:
    """The model, if its tokens are one sequence.

    Raises:
        UserError: they are not.
    """
    if not isinstance(model, TokenTransformer | Deit):
        raise UserError(
            f"attention roll-out follows one sequence of tokens; in a {type(model).__name__} attention stays in blocks"
        )
    return model


@torch.no_grad()
def roll_out(model: ImageModel, images: Tensor) -> Rollout:
    """Roll the attention of all layers out.

    Args:
        model: in evaluation mode; see `check_rollout`.
        images: (B, C, S, S).
    """
    pooled: dict[int, Tensor] = {}
    hooks = []
    try:
        for number, pooling in getattr(model, "pools", {}).items():

            def keep(module: nn.Module, inputs: tuple[Tensor], _output: Tensor, layer: int = int(number)) -> None:
                assert isinstance(module, Pooling)
                pooled[layer] = pool_matrix(module, inputs[0])

            hooks.append(pooling.register_forward_hook(keep))
        with kept_maps(model) as maps:
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    before = _rolled([layer.before for layer in maps], pooled)
    refines = any(layer.after is not None for layer in maps)
    after = _rolled([_used(layer) for layer in maps], pooled) if refines else None
    return Rollout(logits, before, after)


def relevance(model: ImageModel, rolled: Tensor) -> Tensor:
    """What the classifier has drawn from each patch: (B, N', N) -> (B, s, s), of patches in the image.

    The row of the class token, or the mean of all rows where the classifier sees the mean of the tokens.
    """
    has_class_token = isinstance(model, Deit) or getattr(model, "cls_token", None) is not None
    rows = rolled[:, 0, 1:] if has_class_token else rolled.mean(1)
    side = model.img_size // model.patch_size  # type: ignore[operator]
    return rows.unflatten(1, (side, -1))


def pool_matrix(pooling: Pooling, x: Tensor) -> Tensor:
    """From which tokens each pooled one was taken: tokens (B, N, C) -> (B or 1, N', N), rows sum to 1.

    Of a max-pool the part of the channels in which a token was the largest; of the others equal parts of the window.
    """
    pool = pooling.pool
    assert isinstance(pool, TokenPool)
    length = x.shape[1] - int(pooling.class_token)
    if pool.kind == "max":
        plane = x[:, x.shape[1] - length :].transpose(1, 2)
        if pool.dims == 2:
            _, taken = F.max_pool2d(
                plane.unflatten(2, pool.grid), pool.kernel, pool.stride, pool.padding, return_indices=True
            )
        else:
            _, taken = F.max_pool1d(plane, pool.kernel, pool.stride, pool.padding, return_indices=True)
        matrix = F.one_hot(taken.flatten(2), length).float().mean(1)
    else:
        eye = torch.eye(length, device=x.device)[None]  # a channel for every token
        if pool.dims == 2:
            plane = eye.unflatten(2, pool.grid)
            matrix = F.avg_pool2d(plane, pool.kernel, pool.stride, pool.padding, count_include_pad=False).flatten(2)
        else:
            matrix = F.avg_pool1d(eye, pool.kernel, pool.stride, pool.padding)
        matrix = matrix.transpose(1, 2)
    if not pooling.class_token:
        return matrix
    whole = F.pad(matrix, (1, 0, 1, 0))
    whole[:, 0, 0] = 1.0
    return whole


def _used(layer: LayerMaps) -> Tensor:
    return layer.before if layer.after is None else layer.after


def _rolled(maps: list[Tensor], pooled: dict[int, Tensor]) -> Tensor:
    rolled: Tensor | None = None
    for number, heads in enumerate(maps):
        mean = heads.float().abs().mean(1)
        mixed = (mean / mean.sum(-1, keepdim=True) + torch.eye(mean.shape[-1], device=mean.device)) / 2
        rolled = mixed if rolled is None else mixed @ rolled
        if number in pooled:
            rolled = pooled[number] @ rolled
    assert rolled is not None, "a model has layers"
    return rolled
