"""From a decoded picture to the model's input in evaluation: nothing random."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeline.data.augment.crop import pick_resample, require_side, resize_shorter_side
from pipeline.data.augment.settings import EvalTransformConfig


def to_mode(image: Image.Image, in_chans: int) -> Image.Image:
    """The picture as RGB, or as greyscale for one channel."""
    mode = "L" if in_chans == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(C, H, W) float32 in [0, 1] of an RGB or greyscale picture."""
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1)
    return pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


class Placement(NamedTuple):
    """Where the model's input lies in a picture.

    Attributes:
        width, height: of the resized picture, in pixels.
        left, top: the input's corner in it; below 0 where there is a frame around it.
    """

    width: int
    height: int
    left: int
    top: int


class EvalTransform:
    """`transform(image)` is the (C, H, W) float32 model input.

    Args:
        config: how to resize and crop.
        img_size: side of the model's input.
        mean: per channel, of pixels in 0..1; its length is the number of channels.
        std: per channel.
    """

    def __init__(
        self, config: EvalTransformConfig, img_size: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        self.config, self.img_size = config, img_size
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """The input.

        Raises:
            UserError: `resize: none` and the picture does not have the input size.
        """
        image = to_mode(image, len(self.mean))
        pixels = self._antialiased(image) if self.config.antialias else self._point_sampled(image)
        return pixels.sub_(self.mean).div_(self.std)

    def colour(self, rgb: tuple[int, int, int]) -> torch.Tensor:
        """(C,) what a picture of nothing but this colour, in 0..255, becomes."""
        pixel = to_tensor(to_mode(Image.new("RGB", (1, 1), rgb), len(self.mean)))
        return pixel.sub_(self.mean).div_(self.std).flatten()

    def _antialiased(self, image: Image.Image) -> torch.Tensor:
        """Pillow's resize, as torchvision, timm, DeiT, HVT and Refiner evaluate."""
        config, side = self.config, self.img_size
        resample = pick_resample(config.interpolation, 0.0)
        if config.resize == "none":
            require_side(image.size == (side, side), image, side, "without resizing")
        elif config.resize == "resize_only":
            image = image.resize((side, side), resample)
        else:
            _, _, left, top = self.placement(*image.size)
            image = resize_shorter_side(image, int(side / config.crop_pct), resample, antialias=True)
            image = image.crop((left, top, left + side, top + side))  # black outside
        return to_tensor(image)

    def _point_sampled(self, image: Image.Image) -> torch.Tensor:
        """NesT's own evaluation (libml/preprocess.py): float pixels, bilinear without antialiasing, sides rounded."""
        config, side = self.config, self.img_size
        pixels = to_tensor(image)
        if config.resize == "none":
            require_side(image.size == (side, side), image, side, "without resizing")
            return pixels
        if config.resize == "resize_only":
            return _resize(pixels, side, side)
        width, height, left, top = self.placement(*image.size)
        return _resize(pixels, height, width)[:, top : top + side, left : left + side].contiguous()

    def placement(self, width: int, height: int) -> Placement:
        """Where the input comes from in a picture of this size."""
        config, side = self.config, self.img_size
        if config.resize != "crop_pct":
            return Placement(side, side, 0, 0)
        shorter = int(side / config.crop_pct)
        if not config.antialias:
            ratio = np.float32(shorter) / np.float32(min(width, height))
            width, height = (int(np.rint(np.float32(length) * ratio)) for length in (width, height))
            return Placement(width, height, (width - side) // 2, (height - side) // 2)
        width, height = (shorter * length // min(width, height) for length in (width, height))
        return Placement(width, height, _corner(width, side), _corner(height, side))


def _corner(length: int, side: int) -> int:
    """Where the middle `side` pixels begin; a frame is as wide after a shorter length as before it, or 1 px wider."""
    return round((length - side) / 2) if length >= side else -((side - length) // 2)


def _resize(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(
        pixels[None], size=(height, width), mode="bilinear", align_corners=False, antialias=False
    )[0]
