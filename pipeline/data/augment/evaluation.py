"""From a decoded picture to the model's input in evaluation: nothing random."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps

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

    def _antialiased(self, image: Image.Image) -> torch.Tensor:
        """Pillow's resize, as torchvision, timm, DeiT, HVT and Refiner evaluate."""
        config, side = self.config, self.img_size
        resample = pick_resample(config.interpolation, 0.0)
        if config.resize == "none":
            require_side(image.size == (side, side), image, side, "without resizing")
        elif config.resize == "resize_only":
            image = image.resize((side, side), resample)
        else:
            image = _centre(resize_shorter_side(image, int(side / config.crop_pct), resample, antialias=True), side)
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
        ratio = np.float32(int(side / config.crop_pct)) / np.float32(min(image.size))
        height, width = (int(np.rint(np.float32(length) * ratio)) for length in (image.height, image.width))
        top, left = (height - side) // 2, (width - side) // 2
        return _resize(pixels, height, width)[:, top : top + side, left : left + side].contiguous()


def _centre(image: Image.Image, side: int) -> Image.Image:
    """The central square, with a black frame around a smaller picture, which is as wide below and to the right or 1 px
    wider."""
    width, height = image.size
    if min(width, height) < side:
        left, top = max(side - width, 0) // 2, max(side - height, 0) // 2
        right, bottom = max(side - width, 0) - left, max(side - height, 0) - top
        image = ImageOps.expand(image, (left, top, right, bottom), fill=0)
        width, height = image.size
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _resize(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(
        pixels[None], size=(height, width), mode="bilinear", align_corners=False, antialias=False
    )[0]
