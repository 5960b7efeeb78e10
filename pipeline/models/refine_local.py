"""The local kernels of a refiner: which places of an attention map count as neighbours.

Refiner, arXiv 2106.03714, ablation of spatial constraints. The released models convolve a map as an image of N x N
pixels, tokens in raster order on both sides ("raster"). Its code has three more forms in a class that no model uses and
that does not compute what it means to (`models/refiner_utils.py`, SpatialSelfAttention); here is what it means: queries
lie on the image plane, and a kernel covers neighbours there.
"""

from __future__ import annotations

from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.models.errors import ModelError

Local = Literal["raster", "plane", "volume", "plane_then_keys"]


class PlaneLocal(nn.Module):
    """Depthwise kernels over the plane of queries, with zeros beyond its edges: (B, C, N, N) -> same shape.

    The row of a class token's query has no place there and stays as it is; its column, a key, counts as any other.

    Args:
        channels: maps C.
        kernel: side k.
        form: "plane": k x k queries, for every key by itself; "volume": k x k queries and k keys, these in raster
            order; "plane_then_keys": k x k queries, then k keys. All without bias.
    """

    def __init__(self, channels: int, kernel: int, form: Local) -> None:
        super().__init__()

        def conv(queries: int, keys: int) -> nn.Conv3d:
            sides, padding = (queries, queries, keys), (queries // 2, queries // 2, keys // 2)
            return nn.Conv3d(channels, channels, sides, padding=padding, groups=channels, bias=False)

        self.plane = conv(kernel, kernel if form == "volume" else 1)
        self.keys = conv(1, kernel) if form == "plane_then_keys" else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, N, N) -> (B, C, N, N), N = s² or, with a class token in front, 1 + s²."""
        side = isqrt(maps.shape[2])
        first = maps.shape[2] - side**2
        grid = maps[:, :, first:].unflatten(2, (side, side))
        rows = self.keys(self.plane(grid)).flatten(2, 3)
        return torch.cat([maps[:, :, :first], rows], dim=2) if first else rows


def make_local(channels: int, kernel: int, form: Local) -> nn.Module:
    """The local kernels of one refiner: (B, C, N, N) -> same shape."""
    if form != "raster":
        return PlaneLocal(channels, kernel, form)
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)


def check_raster(local: nn.Module, what: str) -> None:
    """Raise ModelError unless these are the kernels of raster order, for `what` that knows no others."""
    if not isinstance(local, nn.Conv2d):
        raise ModelError(f"{what} is for refine.local=raster: leave one of them out")
