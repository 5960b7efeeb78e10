"""The residual discriminator of StyleGAN2, as the authors of NesT used it in their next paper.

Karras et al., arXiv 1912.04958; HiT-GAN, arXiv 2106.07631, official file `models/discriminators.py`: blurred
down-sampling and no equalised learning rates; StyleGAN2's standard deviation over a few images is there, but off.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.errors import ModelError, check_ints

_SLOPE = 0.2
_LAST = 4  # side of the plane that the dense layers see, or more where the image can't be halved to it


class Blur(nn.Module):
    """Halve a plane under the filter (1, 3, 3, 1), with zeros around it: (B, C, S, S) -> (B, C, S/2, S/2).

    As two products with a banded matrix, since depthwise convolutions take far longer to differentiate twice.
    """

    band: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        rows = torch.arange(side // 2)
        band = torch.zeros(side // 2, side + 2)
        for offset, weight in enumerate((1, 3, 3, 1)):
            band[rows, 2 * rows + offset] = weight / 8
        self.register_buffer("band", band[:, 1:-1].contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.band @ x @ self.band.T


class ShrinkingBlock(nn.Module):
    """Residual block that halves the plane: (B, C, S, S) -> (B, C', S/2, S/2)."""

    def __init__(self, in_dim: int, out_dim: int, side: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, in_dim, kernel_size=3, padding=1)
        self.blur = Blur(side)
        self.conv2 = nn.Conv2d(in_dim, out_dim, kernel_size=3, padding=1)
        self.skip = nn.Conv2d(in_dim, out_dim, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.blur(F.leaky_relu(self.conv1(x), _SLOPE))
        branch = F.leaky_relu(self.conv2(branch), _SLOPE)
        return (branch + self.skip(self.blur(x))) / math.sqrt(2.0)


class Discriminator(nn.Module):
    """Logits that an image is real: (B, channels, img_size, img_size) -> (B,).

    Args:
        img_size: side of the image in pixels, even, from 8 on.
        channels: of the image.
        width: channels at the image's size; twice as many at each smaller one.
        max_width: at most.
        group: consecutive images whose standard deviation is a channel of the last plane, so that images that are too
            much alike are told by that; 0: none, and every logit depends on one image.

    Raises:
        ModelError: an image that can't be halved.
    """

    def __init__(
        self, img_size: int = 64, channels: int = 3, width: int = 256, max_width: int = 512, group: int = 0
    ) -> None:
        super().__init__()
        check_ints(1, img_size=img_size, channels=channels, width=width, max_width=max_width)
        if img_size % 2 or img_size < 2 * _LAST:
            raise ModelError(f"img_size={img_size}: the discriminator halves images of an even side from 8 on")
        check_ints(0, group=group)
        self.img_size, self.channels, self.group = img_size, channels, group
        side, dim = img_size, min(width, max_width)
        self.from_pixels = nn.Conv2d(channels, dim, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList()
        while side > _LAST and side % 2 == 0:
            wider = min(2 * dim, max_width)
            self.blocks.append(ShrinkingBlock(dim, wider, side))
            side, dim = side // 2, wider
        self.conv = nn.Conv2d(dim + (group > 0), dim, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(dim * side**2, dim)
        self.fc2 = nn.Linear(dim, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, img_size, img_size) -> (B,)."""
        x = F.leaky_relu(self.from_pixels(images), _SLOPE)
        for block in self.blocks:
            x = block(x)
        if self.group:
            x = torch.cat([x, group_deviation(x, self.group)], dim=1)
        x = F.leaky_relu(self.conv(x), _SLOPE).flatten(1)
        return self.fc2(F.leaky_relu(self.fc1(x), _SLOPE)).squeeze(1)


def group_deviation(x: Tensor, group: int) -> Tensor:
    """Mean standard deviation of each group of consecutive images: (B, C, H, W) -> (B, 1, H, W), one value a group.

    Raises:
        ModelError: the batch can't be cut into groups.
    """
    if len(x) % group:
        raise ModelError(f"{len(x)} images can't be cut into groups of {group} for their standard deviation")
    parts = x.float().unflatten(0, (-1, group))
    deviation = (parts.var(dim=1, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))
    return deviation.repeat_interleave(group)[:, None, None, None].expand(-1, 1, *x.shape[2:]).to(x.dtype)
