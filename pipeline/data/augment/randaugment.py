"""RandAugment in the two forms that the recipes use.

Operations work on RGB and greyscale PIL images. Their pixel arithmetic is PIL's, through timm's functions, except where
a paper's code does something else. A magnitude m on the scale 0..10 acts as the level m / 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from pipeline.data.augment.crop import PixelMap, pick_resample
from pipeline.data.augment.geometry import rotation
from pipeline.data.augment.lazy import TIMM, lazy_function
from pipeline.data.augment.settings import Interpolation, RandAugmentConfig

Fill = int | tuple[int, ...]
_DRAWS_PER_LAYER = 6


@dataclass(frozen=True)
class Op:
    """An operation of a policy.

    Attributes:
        apply: image, argument, filter, colour of uncovered pixels -> image.
        to_arg: level in 0..1, sign (+1 or -1), picture side -> argument; None for operations without one.
        moves: argument, width, height -> where pixels come from; None for operations that leave them in place.
    """

    apply: Callable[[Image.Image, Any, Image.Resampling, Fill], Image.Image]
    to_arg: Callable[[float, int, int], float] | None = None
    moves: Callable[[float, int, int], PixelMap] | None = None


@dataclass(frozen=True)
class DrawnOp:
    """One operation to apply: which, its argument (None: it takes none) and the filter of geometric ones."""

    name: str
    op: Op
    arg: float | None
    resample: Image.Resampling

    def apply(self, image: Image.Image, fill: Fill) -> Image.Image:
        """The image after the operation. `fill` colours what geometric operations uncover."""
        return self.op.apply(image, self.arg, self.resample, fill)

    def moves(self, width: int, height: int) -> PixelMap | None:
        """Where the pixels of a width x height picture come from; None: from where they are."""
        return None if self.op.moves is None or self.arg is None else self.op.moves(self.arg, width, height)


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keep the `bits` highest bits. 0 gives black, as in the papers' code; Pillow's own function now refuses it."""
    return image.point([value & (0xFF00 >> bits) for value in range(256)] * len(image.getbands()))


def nest_shear_x(image: Image.Image, factor: float, resample: Image.Resampling, fill: Fill) -> Image.Image:
    """Shear that keeps the centres of the first row fixed, as TensorFlow does; PIL's keeps its upper edge."""
    matrix = (1, factor, -factor / 2, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def nest_shear_y(image: Image.Image, factor: float, resample: Image.Resampling, fill: Fill) -> Image.Image:
    """As `nest_shear_x`, for columns."""
    matrix = (1, 0, 0, factor, 1, -factor / 2)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def nest_translate_pixels(side: int) -> int:
    """Shift at level 1: a table in NesT's code (rand_augment.py), 30 % of the side where it has no entry."""
    return {224: 100, 128: 40, 96: 30, 32: 10}.get(side, int(0.3 * side))


_timm = partial(lazy_function, TIMM)


def _plain(function: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    return lambda image, arg, resample, fill: function(image) if arg is None else function(image, arg)


def _warp(function: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    return lambda image, arg, resample, fill: function(image, arg, resample=resample, fillcolor=fill)


def _signed(scale: float, level: float, sign: int, side: int) -> float:
    return sign * scale * level


def _nest_shift(level: float, sign: int, side: int) -> float:
    return sign * level * nest_translate_pixels(side)


def _enhance(level: float, sign: int, side: int) -> float:
    return 1.8 * level + 0.1


def _enhance_increasing(level: float, sign: int, side: int) -> float:
    return max(0.1, 1.0 + sign * 0.9 * level)


def _sheared_x(factor: float, width: int, height: int) -> PixelMap:
    return (1, factor, 0, 0, 1, 0)


def _sheared_y(factor: float, width: int, height: int) -> PixelMap:
    return (1, 0, 0, factor, 1, 0)


def _shifted_x(pixels: float, width: int, height: int) -> PixelMap:
    return (1, 0, pixels, 0, 1, 0)


def _shifted_y(pixels: float, width: int, height: int) -> PixelMap:
    return (1, 0, 0, 0, 1, pixels)


_COMMON = {
    "AutoContrast": Op(_plain(_timm("auto_contrast"))),
    "Equalize": Op(_plain(_timm("equalize"))),
    "Invert": Op(_plain(_timm("invert"))),
    "Rotate": Op(_warp(_timm("rotate")), partial(_signed, 30.0), rotation),
    "SolarizeAdd": Op(_plain(_timm("solarize_add")), lambda level, sign, side: int(110 * level)),
}

# augment/rand_augment.py and augment/augment_ops.py of google-research/nested-transformer. All enhancements go one way;
# the threshold of solarize is an 8-bit number, so that level 1 still inverts the value 255.
_NEST = _COMMON | {
    "Posterize": Op(_plain(posterize), lambda level, sign, side: int(4 * level)),
    "Solarize": Op(_plain(_timm("solarize")), lambda level, sign, side: min(255, int(256 * level))),
    "Color": Op(_plain(_timm("color")), _enhance),
    "Contrast": Op(_plain(_timm("contrast")), _enhance),
    "Brightness": Op(_plain(_timm("brightness")), _enhance),
    "Sharpness": Op(_plain(_timm("sharpness")), _enhance),
    "ShearX": Op(nest_shear_x, partial(_signed, 0.3), lambda f, width, height: (1, f, -f / 2, 0, 1, 0)),
    "ShearY": Op(nest_shear_y, partial(_signed, 0.3), lambda f, width, height: (1, 0, 0, f, 1, -f / 2)),
    "TranslateX": Op(_warp(_timm("translate_x_abs")), _nest_shift, _shifted_x),
    "TranslateY": Op(_warp(_timm("translate_y_abs")), _nest_shift, _shifted_y),
    "Identity": Op(_plain(lambda image: image)),
}

# timm.data.auto_augment, `rand-...-inc1`: every operation grows stronger with the level.
_TIMM_INC = _COMMON | {
    "PosterizeIncreasing": Op(_plain(posterize), lambda level, sign, side: 4 - int(4 * level)),
    "SolarizeIncreasing": Op(_plain(_timm("solarize")), lambda level, sign, side: 256 - min(256, int(256 * level))),
    "ColorIncreasing": Op(_plain(_timm("color")), _enhance_increasing),
    "ContrastIncreasing": Op(_plain(_timm("contrast")), _enhance_increasing),
    "BrightnessIncreasing": Op(_plain(_timm("brightness")), _enhance_increasing),
    "SharpnessIncreasing": Op(_plain(_timm("sharpness")), _enhance_increasing),
    "ShearX": Op(_warp(_timm("shear_x")), partial(_signed, 0.3), _sheared_x),
    "ShearY": Op(_warp(_timm("shear_y")), partial(_signed, 0.3), _sheared_y),
    "TranslateXRel": Op(
        _warp(_timm("translate_x_rel")),
        partial(_signed, 0.45),
        lambda part, width, height: _shifted_x(part * width, width, height),
    ),
    "TranslateYRel": Op(
        _warp(_timm("translate_y_rel")),
        partial(_signed, 0.45),
        lambda part, width, height: _shifted_y(part * height, width, height),
    ),
}

POLICIES: dict[str, dict[str, Op]] = {"nest": _NEST, "timm-inc": _TIMM_INC}


def rand_augment_draws(config: RandAugmentConfig) -> int:
    """How many uniform numbers `draw_ops` reads."""
    return _DRAWS_PER_LAYER * config.layers


def draw_ops(
    config: RandAugmentConfig, side: int, interpolation: Interpolation, u: Sequence[float]
) -> tuple[DrawnOp, ...]:
    """The operations to apply to a picture of `side` pixels.

    Args:
        interpolation: filter of timm-inc's geometric operations; the policy `nest` always takes the nearest pixel.
        u: `rand_augment_draws(config)` uniform numbers.
    """
    policy = POLICIES[config.policy]
    names = list(policy)
    drawn = []
    for layer in range(config.layers):
        which, applied, u_radius, u_angle, u_sign, u_filter = u[_DRAWS_PER_LAYER * layer :][:_DRAWS_PER_LAYER]
        if applied >= config.prob:
            continue
        name = names[int(which * len(names))]
        normal = math.sqrt(-2 * math.log(1 - u_radius)) * math.cos(2 * math.pi * u_angle)
        level = min(max(config.magnitude + config.std * normal, 0.0), 10.0) / 10
        op = policy[name]
        arg = None if op.to_arg is None else op.to_arg(level, 1 if u_sign < 0.5 else -1, side)
        nearest = config.policy == "nest"
        resample = Image.Resampling.NEAREST if nearest else pick_resample(interpolation, u_filter)
        drawn.append(DrawnOp(name, op, arg, resample))
    return tuple(drawn)


def fill_color(policy: str, mean: Sequence[float]) -> Fill:
    """Colour of uncovered pixels: grey 128 (nest), or the mean colour of the data (timm)."""
    color = (128,) * len(mean) if policy == "nest" else tuple(min(255, round(255 * m)) for m in mean)
    return color[0] if len(color) == 1 else color
