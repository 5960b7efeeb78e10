"""A convolutional generator to compare with: that of SAGAN without its self-attention, as NesT's authors compared.

Zhang et al., "Self-Attention Generative Adversarial Networks", arXiv 1805.08318. Unconditional, so its BatchNorms have
one scale and shift each; without spectral norm, and its output isn't squashed, as in the generators beside it.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.batch_norm import BatchNorm2d
from pipeline.models.errors import ModelError, check_ints
from pipeline.models.generate.base import Generator

_START = 4  # side of the plane that a latent becomes


class GrowingBlock(nn.Module):
    """Residual block that doubles the plane: (B, C, H, W) -> (B, C', 2H, 2W)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = BatchNorm2d(in_dim)
        self.conv1 = nn.Conv2d(in_dim, out_dim, kernel_size=3, padding=1)
        self.norm2 = BatchNorm2d(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, kernel_size=3, padding=1)
        self.skip = nn.Conv2d(in_dim, out_dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(F.interpolate(F.relu(self.norm1(x)), scale_factor=2.0))
        branch = self.conv2(F.relu(self.norm2(branch)))
        return branch + F.interpolate(self.skip(x), scale_factor=2.0)


class ConvGenerator(Generator):
    """(B, latent_dim) -> images (B, channels, img_size, img_size), not cut off.

    Args:
        img_size: side of the image, a power of 2 from 8 on.
        channels: of the image.
        latent_dim: length of a latent.
        width: channels of the last block; twice as many in each block before.

    Raises:
        ModelError: another side.
    """

    def __init__(self, img_size: int = 64, channels: int = 3, latent_dim: int = 256, width: int = 56) -> None:
        super().__init__(img_size, channels, latent_dim)
        check_ints(1, width=width)
        blocks = (img_size // _START).bit_length() - 1
        if blocks < 1 or _START * 2**blocks != img_size:
            raise ModelError(f"img_size={img_size}: the convolutional generator makes 8, 16, 32, 64, ... pixels")
        dims = [width * 2 ** (blocks - i) for i in range(blocks + 1)]
        self.from_latent = nn.Linear(latent_dim, _START**2 * dims[0])
        self.blocks = nn.ModuleList(GrowingBlock(*pair) for pair in pairwise(dims))
        self.norm = BatchNorm2d(width)
        self.to_pixels = nn.Conv2d(width, channels, kernel_size=3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, latent_dim) -> (B, channels, img_size, img_size)."""
        x = self.from_latent(latents).unflatten(-1, (-1, _START, _START))
        for block in self.blocks:
            x = block(x)
        return self.to_pixels(F.relu(self.norm(x)))
