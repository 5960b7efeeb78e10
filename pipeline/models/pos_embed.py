"""Fitting position embeddings of one image size to a model of another."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.blocks import blockify, unblockify
from pipeline.models.errors import ModelError, check_choice

Mode = Literal["bicubic", "bilinear"]


def resize_pos_embed(state_dict: Mapping[str, Tensor], model: nn.Module, mode: Mode = "bicubic") -> dict[str, Tensor]:
    """A state dict whose position embeddings have the shapes that `model` needs; the rest is passed on as it is.

    NesT's embeddings differ between blocks, (1, T, n, d). Where the number of blocks T stays, each block is
    interpolated by itself, so that nothing bleeds over its border. Where T changes, the image plane is put together,
    interpolated and cut again.

    Args:
        state_dict: weights trained at another image size, block grid or both.
        model: the model they are meant for.
        mode: "bicubic" (pixel centres aligned), or "bilinear" (corners aligned), the rule of the official fine-tuning.

    Raises:
        ModelError: an embedding has another width or number of axes.
    """
    check_choice("mode", mode, Mode)
    resized = dict(state_dict)
    for name, param in model.named_parameters():
        if name.endswith("pos_embed") and name in resized and resized[name].shape != param.shape:
            resized[name] = _resize_blocks(name, resized[name], param, mode)
    return resized


def _resize_blocks(name: str, old: Tensor, new: Tensor, mode: Mode) -> Tensor:
    if old.ndim != 4 or new.ndim != 4 or old.shape[-1] != new.shape[-1]:
        raise ModelError(f"{name} of shape {tuple(old.shape)} can't be resized to {tuple(new.shape)}")
    num_blocks, block_size = new.shape[1], isqrt(new.shape[2])
    if old.shape[1] == num_blocks:
        planes = unblockify(old.transpose(0, 1).contiguous())  # (T, p, p, d): every block a plane of its own
        return _interpolate(planes, block_size, mode).flatten(1, 2).unsqueeze(0)
    side = isqrt(num_blocks) * block_size
    return blockify(_interpolate(unblockify(old), side, mode), block_size)


def _interpolate(planes: Tensor, side: int, mode: Mode) -> Tensor:
    """(N, s, s, d) -> (N, side, side, d)."""
    align = mode == "bilinear"
    return F.interpolate(planes.permute(0, 3, 1, 2), (side, side), mode=mode, align_corners=align).permute(0, 2, 3, 1)
