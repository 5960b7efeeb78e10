"""NesT's block aggregation, and the alternatives its paper compares it with.

NesT, arXiv 2105.12723, appendix; the authors released only "conv_pool" on the image plane. An aggregation halves both
sides of the plane and changes the width, so that four blocks become one of the same number of tokens. On the image
plane windows cross the borders of the blocks that are merged; on the block plane every 2x2 group of blocks is padded
and processed by itself, so that nothing crosses its border.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.errors import ModelError, check_choice

NORM_EPS = 1e-6

Aggregation = Literal["conv_pool", "conv", "patch_merge", "max2", "max3", "avg2", "avg3"]
Plane = Literal["image", "block"]
PoolPad = Literal["same", "symmetric"]


class Aggregate(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, C'), H and W even.

    Args:
        kind: "conv_pool", the paper's: 3x3 convolution, LayerNorm, 3x3 max-pool of stride 2;
            "conv": 3x3 convolution of stride 2, LayerNorm;
            "patch_merge": the four tokens of a 2x2 window side by side, LayerNorm, linear map without bias (Swin);
            "max2", "max3", "avg2", "avg3": linear map where the width changes, LayerNorm, 2x2 or 3x3 pool of stride 2.
        in_dim, out_dim: C and C'.
        plane: "image", or "block": each group of 2x2 blocks by itself.
        block_size: tokens on a side of a block.
        pool_pad: windows of three and stride 2 see "same", no padding before and one row after, as JAX has it for even
            sides; or "symmetric", one row before and none after (timm's `nest_*` without `_jx`).
    """

    def __init__(
        self, kind: Aggregation, in_dim: int, out_dim: int, plane: Plane, block_size: int, pool_pad: PoolPad
    ) -> None:
        super().__init__()
        check_choice("aggregation", kind, Aggregation)
        check_choice("aggregation_plane", plane, Plane)
        check_choice("pool_pad", pool_pad, PoolPad)
        if pool_pad == "symmetric" and kind not in ("conv_pool", "max3", "avg3"):
            raise ModelError(f"pool_pad=symmetric acts on pools of three; aggregation={kind} has none, leave it out")
        self.kind = kind
        self.pool_pad = pool_pad
        self.group = 2 * block_size if plane == "block" else None
        if kind == "conv_pool":
            self.conv: nn.Module = nn.Conv2d(in_dim, out_dim, kernel_size=3, padding=1)
        elif kind == "conv":
            self.conv = nn.Conv2d(in_dim, out_dim, kernel_size=3, stride=2)
        elif kind == "patch_merge":
            self.conv = nn.Linear(4 * in_dim, out_dim, bias=False)
        else:
            self.conv = nn.Conv2d(in_dim, out_dim, kernel_size=1) if in_dim != out_dim else nn.Identity()
        self.norm = nn.LayerNorm(4 * in_dim if kind == "patch_merge" else out_dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H/2, W/2, C'), channels last."""
        if self.group is None:
            return self._aggregate(x)
        b, h, w, _ = x.shape
        rows, columns = h // self.group, w // self.group
        groups = x.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).transpose(2, 3).flatten(0, 2)
        merged = self._aggregate(groups).unflatten(0, (b, rows, columns))
        return merged.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _aggregate(self, x: Tensor) -> Tensor:
        if self.kind == "patch_merge":
            windows = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3)  # (B, H/2, W/2, 2, 2, C)
            return self.conv(self.norm(windows.flatten(3)))
        x = x.permute(0, 3, 1, 2)
        x = self.conv(F.pad(x, (0, 1, 0, 1)) if self.kind == "conv" else x)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._pool(x).permute(0, 2, 3, 1)

    def _pool(self, x: Tensor) -> Tensor:
        if self.kind == "conv":
            return x
        if self.kind in ("max2", "avg2"):
            return F.max_pool2d(x, 2) if self.kind == "max2" else F.avg_pool2d(x, 2)
        # On an even side ceil mode clips the last window at the border, which is a pad of one row after it.
        if self.kind == "avg3":
            return self._average(x)
        if self.pool_pad == "same":
            return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)

    def _average(self, x: Tensor) -> Tensor:
        """3x3 windows whose average leaves out what lies outside the plane."""
        if self.pool_pad == "same":
            return F.avg_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
        return F.avg_pool2d(x, kernel_size=3, stride=2, padding=1, count_include_pad=False)
