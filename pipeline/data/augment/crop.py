"""Resizing, cropping and small affine maps of PIL images: what to do is drawn first, then done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.augment.settings import AffineConfig, Interpolation, PadCrop, RandomResizedCrop
from pipeline.errors import UserError

# torchvision and timm try 10 times. TensorFlow tries 100 times, but hardly ever needs a second attempt.
_ATTEMPTS = 10
CROP_DRAWS = 4 * _ATTEMPTS
AFFINE_DRAWS = 5

# Coefficients (a, b, c, d, e, f) of Pillow's transform: a pixel at (x, y) comes from (a x + b y + c, d x + e y + f).
PixelMap = tuple[float, float, float, float, float, float]


class HasSize(Protocol):
    """A picture, as far as messages speak of it."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...


@dataclass(frozen=True)
class Box:
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Affine:
    """Arguments of torchvision's `affine`: degrees, pixels, magnification, degrees."""

    angle: float
    translate: tuple[int, int]
    scale: float
    shear: float


def pick_resample(interpolation: Interpolation, u: float) -> Image.Resampling:
    """The PIL filter; `random` takes bilinear or bicubic by the uniform number `u`, as timm does."""
    if interpolation == "random":
        interpolation = "bilinear" if u < 0.5 else "bicubic"
    return Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC


def draw_resized_crop(config: RandomResizedCrop, width: int, height: int, u: Sequence[float]) -> Box:
    """The part of a width x height picture to cut out. `u` holds `CROP_DRAWS` uniform numbers."""
    draw = _draw_by_area if config.sampler == "area" else _draw_by_side
    for attempt in range(_ATTEMPTS):
        box = draw(config, width, height, u[4 * attempt : 4 * attempt + 4])
        if box is not None:
            return box
    if config.sampler == "side":
        return Box(0, 0, height, width)
    return _central_box(config.ratio, width, height)


def _draw_by_area(config: RandomResizedCrop, width: int, height: int, u: Sequence[float]) -> Box | None:
    """Uniform area and log-uniform ratio, as in torchvision and timm."""
    area = (config.scale[0] + (config.scale[1] - config.scale[0]) * u[0]) * width * height
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = math.exp(low + (high - low) * u[1])
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if not (0 < w <= width and 0 < h <= height):
        return None
    return Box(int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w)


def _draw_by_side(config: RandomResizedCrop, width: int, height: int, u: Sequence[float]) -> Box | None:
    """Uniform ratio, then uniform height, as in TensorFlow's sample_distorted_bounding_box.

    A crop's last possible offset is never drawn there, and so not here.
    """
    ratio = config.ratio[0] + (config.ratio[1] - config.ratio[0]) * u[0]
    min_area, max_area = config.scale[0] * width * height, config.scale[1] * width * height
    max_h = min(round(math.sqrt(max_area / ratio)), height)
    if round(max_h * ratio) > width:
        max_h = int((width + 0.5 - 1e-7) / ratio)
    min_h = min(round(math.sqrt(min_area / ratio)), max_h)
    h = min_h + int(u[1] * (max_h - min_h + 1))
    # One pixel of leeway, as there, for sides whose rounding leaves the range of areas.
    if h * round(h * ratio) < min_area:
        h += 1
    if h * round(h * ratio) > max_area:
        h -= 1
    w = round(h * ratio)
    if not min_area <= w * h <= max_area or w > width or h > height:
        return None
    return Box(int(u[2] * (height - h)), int(u[3] * (width - w)), h, w)


def _central_box(ratio: tuple[float, float], width: int, height: int) -> Box:
    """The largest central part whose ratio is allowed: torchvision's answer when no attempt fits."""
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling, antialias: bool) -> Image.Image:
    """Resize to `size` = (width, height).

    Without antialiasing every output pixel interpolates between the four input pixels around its centre, and the result
    is cut to whole numbers: what tf.image.resize followed by a cast to uint8 gives.
    """
    if image.size == size:
        return image
    if antialias:
        return image.resize(size, resample)
    return image.transform(size, Image.Transform.EXTENT, (0, 0, *image.size), resample)


def resize_shorter_side(image: Image.Image, side: int, resample: Image.Resampling, antialias: bool) -> Image.Image:
    """Resize, keeping the proportions, so that the shorter side has `side` pixels; the longer is rounded down."""
    width, height = image.size
    short = min(width, height)
    return resize(image, (side * width // short, side * height // short), resample, antialias)


def cut(image: Image.Image, box: Box) -> Image.Image:
    """The pixels of `box`."""
    return image.crop((box.left, box.top, box.left + box.width, box.top + box.height))


def pad_crop(image: Image.Image, config: PadCrop, side: int, u: Sequence[float]) -> Image.Image:
    """A random square of the padded picture.

    Raises:
        UserError: the padded picture is smaller than `side`.
    """
    return cut(*padded(image, config, side, u))


def padded(image: Image.Image, config: PadCrop, side: int, u: Sequence[float]) -> tuple[Image.Image, Box]:
    """The padded picture, and the random square of it that is to be cut out.

    Raises:
        UserError: the padded picture is smaller than `side`.
    """
    p = config.padding
    if config.fill == "zero":
        larger = ImageOps.expand(image, border=p, fill=0)
    else:
        pixels = np.asarray(image)
        larger = Image.fromarray(np.pad(pixels, [(p, p), (p, p), (0, 0)][: pixels.ndim], mode="reflect"))
    width, height = larger.size
    require_side(min(width, height) >= side, image, side, f"with {p} px of padding")
    return larger, Box(int(u[0] * (height - side + 1)), int(u[1] * (width - side + 1)), side, side)


def require_side(fits: bool, image: HasSize, side: int, how: str) -> None:
    """Refuse a picture from which the input can't be cut."""
    if not fits:
        raise UserError(
            f"a {image.width}x{image.height} picture can't give a {side}x{side} input {how}: "
            "choose augment.crop=rrc, or center after augment.resize; in evaluation eval_transform.resize=crop_pct"
        )


def draw_affine(config: AffineConfig, side: int, u: Sequence[float]) -> Affine:
    """An affine map of a picture of `side` pixels. `u` holds `AFFINE_DRAWS` uniform numbers."""
    reach = config.translate * side
    return Affine(
        angle=config.degrees * (2 * u[0] - 1),
        translate=(round(reach * (2 * u[1] - 1)), round(reach * (2 * u[2] - 1))),
        scale=config.scale[0] + (config.scale[1] - config.scale[0]) * u[3],
        shear=config.shear * (2 * u[4] - 1),
    )


def apply_affine(image: Image.Image, affine: Affine) -> Image.Image:
    """The mapped picture, bilinear, black where nothing was."""
    back = affine_pixels(affine, *image.size)
    return image.transform(image.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)


def affine_pixels(affine: Affine, width: int, height: int) -> PixelMap:
    """torchvision's `affine`: the inverse of shearing, magnifying and rotating about the centre, then shifting."""
    rotate, shear = math.radians(affine.angle), math.tan(math.radians(affine.shear))
    cos, sin = affine.scale * math.cos(rotate), affine.scale * math.sin(rotate)
    # No vertical shear here, so that the shear is the second factor of the matrix alone.
    back = np.linalg.inv(np.array([[cos, -cos * shear - sin], [sin, -sin * shear + cos]]))
    middle = np.array([width / 2, height / 2])
    shift = middle - back @ (np.array(affine.translate) + middle)
    return (*back[0].tolist(), float(shift[0]), *back[1].tolist(), float(shift[1]))
