"""Block de-aggregation: how one block of the transposed NesT becomes four.

NesT, arXiv 2105.12723, section on generation: the one thing that differs from the classifier. The authors released no
code of it; the paper up-samples the whole feature map by pixel shuffle, and compares it with what convolutional
networks use. The map to the next width follows the shuffle as in the same authors' HiT-GAN, arXiv 2106.07631.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.blocks import blockify, unblockify
from pipeline.models.errors import ModelError, check_choice

Deaggregation = Literal["pixel_shuffle", "nearest", "bilinear", "conv_transpose"]


class Deaggregate(nn.Module):
    """(B, H, W, C) -> (B, 2H, 2W, C').

    Args:
        kind: "pixel_shuffle", the paper's: the channels of a token become those of four, then a linear map to C', left
            out where C' = C / 4 already;
            "nearest", "bilinear": the plane is enlarged, then a linear map where the width changes;
            "conv_transpose": 4x4 transposed convolution of stride 2.
        in_dim, out_dim: C and C'.

    Raises:
        ModelError: an unknown kind, or channels that don't make four tokens.
    """

    def __init__(self, kind: Deaggregation, in_dim: int, out_dim: int) -> None:
        super().__init__()
        check_choice("deaggregation", kind, Deaggregation)
        self.kind = kind
        if kind == "conv_transpose":
            self.map: nn.Module = nn.ConvTranspose2d(in_dim, out_dim, kernel_size=4, stride=2, padding=1)
            return
        if kind == "pixel_shuffle" and in_dim % 4:
            raise ModelError(
                f"deaggregation=pixel_shuffle makes four tokens of one, and embed_dims={in_dim} isn't a multiple of 4"
            )
        width = in_dim // 4 if kind == "pixel_shuffle" else in_dim
        self.map = nn.Linear(width, out_dim) if width != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, 2H, 2W, C')."""
        if self.kind == "pixel_shuffle":
            return self.map(pixel_shuffle(x, 2))
        plane = x.permute(0, 3, 1, 2)
        if self.kind == "conv_transpose":
            return self.map(plane).permute(0, 2, 3, 1)
        corners = None if self.kind == "nearest" else False
        enlarged = F.interpolate(plane, scale_factor=2.0, mode=self.kind, align_corners=corners)
        return self.map(enlarged.permute(0, 2, 3, 1))


def pixel_shuffle(x: Tensor, side: int) -> Tensor:
    """Make a block of side x side tokens of every token: (B, S, S, side² C) -> (B, side S, side S, C).

    The channels of a token are those of the block's tokens in raster order, so this is `unblockify` of blocks that
    were laid into channels; `pixel_unshuffle` is its inverse, to the bit.
    """
    return unblockify(x.flatten(1, 2).unflatten(-1, (side * side, -1)))


def pixel_unshuffle(x: Tensor, side: int) -> Tensor:
    """Lay the tokens of every block into the channels of one: (B, side S, side S, C) -> (B, S, S, side² C)."""
    b, h, w, _ = x.shape
    return blockify(x, side).reshape(b, h // side, w // side, -1)
