"""Colour jitter of SimCLR v2, as NesT's ImageNet recipe uses it (augment/color_util.py of its code).

It is not torchvision's ColorJitter: contrast stretches every channel about its own mean, and saturation scales the S of
HSV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch

from pipeline.data.augment.lazy import TORCHVISION, LazyModule
from pipeline.data.augment.settings import ColorJitterConfig

tvf = LazyModule(TORCHVISION)

COLOR_JITTER_DRAWS = 7
_ORDERS = list(permutations(("brightness", "contrast", "saturation", "hue")))


@dataclass(frozen=True)
class ColorJitter:
    """What to do to one picture: adjustments with their amounts, in order, then perhaps to grey."""

    adjustments: tuple[tuple[str, float], ...]
    gray: bool


def draw_color_jitter(config: ColorJitterConfig, u: Sequence[float]) -> ColorJitter:
    """Amounts and order. `u` holds `COLOR_JITTER_DRAWS` uniform numbers."""
    gray = u[1] < config.gray_prob
    if u[0] >= config.prob:
        return ColorJitter((), gray)
    reach = 0.8 * config.strength
    factors = [1 + reach * (2 * v - 1) for v in u[3:6]]
    hue = 0.2 * config.strength * (2 * u[6] - 1)
    amounts = dict(zip(("brightness", "contrast", "saturation", "hue"), [*factors, hue], strict=True))
    order = _ORDERS[int(u[2] * len(_ORDERS))]
    return ColorJitter(tuple((name, amounts[name]) for name in order), gray)


def apply_color_jitter(image: torch.Tensor, jitter: ColorJitter) -> torch.Tensor:
    """The jittered (C, H, W) float image; values stay in [0, 1]. A single channel has neither saturation nor hue."""
    for name, amount in jitter.adjustments:
        if name == "brightness":
            image = tvf.adjust_brightness(image, amount)
        elif name == "contrast":
            image = adjust_contrast(image, amount)
        elif image.shape[0] == 3:
            image = adjust_saturation(image, amount) if name == "saturation" else adjust_hue(image, amount)
    if jitter.gray and image.shape[0] == 3:
        image = tvf.rgb_to_grayscale(image, num_output_channels=3)
    # torchvision's grey picture is one channel, seen three times.
    return image.contiguous()


def adjust_contrast(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Distance of each value from its channel's mean, times `factor`, cut to [0, 1]."""
    mean = image.mean(dim=(-2, -1), keepdim=True)
    return torch.lerp(mean, image, factor).clamp_(0, 1)


def adjust_saturation(image: torch.Tensor, factor: float) -> torch.Tensor:
    """S of HSV times `factor`, at most 1.

    With V = max(R, G, B) and S = (V - min) / V, scaling S moves every channel away from V by the same factor.
    """
    value, low = image.amax(dim=-3, keepdim=True), image.amin(dim=-3, keepdim=True)
    largest = value / (value - low).clamp_min(torch.finfo(image.dtype).tiny)
    return (value - (value - image) * largest.clamp_max(factor)).clamp_(0, 1)


def adjust_hue(image: torch.Tensor, turns: float) -> torch.Tensor:
    """H of HSV turned by `turns`, 1 being the whole circle. (torchvision's takes five times as long.)"""
    red, green, blue = image.unbind(-3)
    value, chroma = image.amax(-3), image.amax(-3) - image.amin(-3)
    divisor = chroma.clamp_min(torch.finfo(image.dtype).tiny)
    of_blue = torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    hue = torch.where(value == red, (green - blue) / divisor, of_blue)
    # On the circle of six, red falls away from V around hue 3, green around 5 and blue around 1.
    around = torch.tensor([5.0, 3.0, 1.0], device=image.device).view(3, 1, 1) + 6 * turns
    place = (hue.unsqueeze(-3) + around).remainder_(6)
    fall = torch.minimum(place, 4 - place).clamp_(0, 1)
    return value.unsqueeze(-3) - chroma.unsqueeze(-3) * fall
