"""From pixels to tokens: (B, in_chans, S, S) -> (B, C, S / patch_size, S / patch_size)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.batch_norm import BatchNorm2d
from pipeline.models.errors import ModelError


class PatchStem(nn.Module):
    """One convolution over patches that don't overlap (ViT, DeiT, HVT)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, S, S) -> (B, C, S / patch_size, S / patch_size)."""
        return self.proj(images)


class ConvStem(nn.Module):
    """Refiner's stem: a 7x7 convolution of stride 2, two of 3x3, each with BN and ReLU, then patches.

    Official file: `models/refined_transformer.py`, class PatchEmbed_cnn.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, widths: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        if patch_size % 2:
            raise ModelError(f"stem=conv halves the image first and needs an even patch_size, not {patch_size}")
        a, b, c = widths
        self.conv1 = nn.Conv2d(in_chans, a, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(a)
        self.conv2 = nn.Conv2d(a, b, kernel_size=3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(b)
        self.conv3 = nn.Conv2d(b, c, kernel_size=3, padding=1, bias=False)
        self.bn3 = BatchNorm2d(c)
        self.proj = nn.Conv2d(c, dim, kernel_size=patch_size // 2, stride=patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, S, S) -> (B, C, S / patch_size, S / patch_size)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.proj(x)
