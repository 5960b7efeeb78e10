"""Fitting position embeddings of one image size to a model of another."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.base import ImageModel
from pipeline.models.blocks import blockify, unblockify
from pipeline.models.errors import ModelError, check_choice

Mode = Literal["bicubic", "bilinear"]


def resize_pos_embed(state_dict: Mapping[str, Tensor], model: ImageModel, mode: Mode = "bicubic") -> dict[str, Tensor]:
    """A state dict whose position embeddings have the shapes that `model` needs; the rest is passed on as it is.

    Args:
        state_dict: weights trained at another image size, block grid or both.
        model: the model they are meant for.
        mode: "bicubic" (pixel centres aligned), or "bilinear" (corners aligned), the rule of NesT's code.

    Raises:
        ModelError: an embedding can't be fitted, for another reason than the size of the image.
    """
    check_choice("mode", mode, Mode)
    resized = dict(state_dict)
    for name, param in model.named_parameters():
        if name.endswith("pos_embed") and name in resized and resized[name].shape != param.shape:
            fitted = model.fit_pos_embed(name, state_dict, mode)
            if fitted is None or fitted.shape != param.shape:
                old, new = tuple(state_dict[name].shape), tuple(param.shape)
                raise ModelError(f"{name} of shape {old} can't be resized to {new}")
            resized[name] = fitted.to(state_dict[name].dtype)
    return resized


def resize_blocks(old: Tensor, num_blocks: int, block_size: int, mode: Mode) -> Tensor | None:
    """Embeddings that differ between blocks, as in NesT: (1, T, n, C) -> (1, num_blocks, block_size², C).

    Where the number of blocks stays, each block is interpolated by itself, so that nothing bleeds over its border.
    Where it changes, the image plane is put together, interpolated and cut again. None: not of that form.
    """
    if old.ndim != 4:
        return None
    if old.shape[1] == num_blocks:
        planes = unblockify(old.transpose(0, 1).contiguous())  # (T, p, p, C): every block a plane of its own
        return _interpolate(planes, block_size, block_size, mode).flatten(1, 2).unsqueeze(0)
    side = isqrt(num_blocks) * block_size
    return blockify(_interpolate(unblockify(old), side, side, mode), block_size)


def resize_grid(old: Tensor, extra: int, side: int, mode: Mode) -> Tensor | None:
    """Embeddings of a square grid of tokens: (1, extra + s², C) -> (1, extra + side², C).

    The first `extra` ones, of a class token, stay as they are. None: not of that form.
    """
    tokens = old.shape[1] - extra if old.ndim == 3 else 0
    if tokens < 1 or isqrt(tokens) ** 2 != tokens:
        return None
    first, grid = old[:, :extra], old[:, extra:]
    s = isqrt(grid.shape[1])
    plane = _interpolate(grid.unflatten(1, (s, s)), side, side, mode)
    return torch.cat([first, plane.flatten(1, 2)], dim=1)


def resize_plane(old: Tensor, old_shape: tuple[int, int], new_shape: tuple[int, int], mode: Mode) -> Tensor | None:
    """Embeddings of a grid of (rows, columns): (1, N, C) -> (1, N', C). None: not of that form."""
    if old.ndim != 3 or old.shape[1] != old_shape[0] * old_shape[1]:
        return None
    return _interpolate(old.unflatten(1, old_shape), *new_shape, mode).flatten(1, 2)


def resize_raster(
    old: Tensor, old_side: int, new_side: int, new_length: int, step: float, first: float, mode: Mode
) -> Tensor:
    """Embeddings of a sequence pooled along the raster order of a square grid: (1, N, C) -> (1, new_length, C).

    Token j of such a sequence has its middle at place `first + step * j` of the unpooled raster order, in the old grid
    as in the new. So the sequence is spread over the old grid, the grid is interpolated, and the new sequence is taken
    from it: rows stay rows, which interpolating along the sequence would not keep.
    """
    places = (torch.arange(old_side**2) - first) / step
    grid = _sample(old, places).unflatten(1, (old_side, old_side))
    raster = _interpolate(grid, new_side, new_side, mode).flatten(1, 2)
    return _sample(raster, first + step * torch.arange(new_length))


def _sample(sequence: Tensor, places: Tensor) -> Tensor:
    """Linear interpolation of (1, N, C) at places 0 ... N-1, clamped to the ends: (1, len(places), C)."""
    places = places.clamp(0, sequence.shape[1] - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=sequence.shape[1] - 1)
    weight = (places - below).to(sequence.dtype)[None, :, None]
    return sequence[:, below] * (1 - weight) + sequence[:, above] * weight


def _interpolate(planes: Tensor, rows: int, columns: int, mode: Mode) -> Tensor:
    """(N, r, c, C) -> (N, rows, columns, C)."""
    align = mode == "bilinear"
    return F.interpolate(planes.permute(0, 3, 1, 2), (rows, columns), mode=mode, align_corners=align).permute(
        0, 2, 3, 1
    )
