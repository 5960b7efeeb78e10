"""Random erasing of one box of a normalised picture: timm's rules, or those of NesT's code."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.data.augment.crop import Box
from pipeline.data.augment.settings import RandomErasingConfig

_ATTEMPTS = 10
ERASING_DRAWS = 1 + 4 * _ATTEMPTS


def draw_erasing(config: RandomErasingConfig, side: int, u: Sequence[float]) -> Box | None:
    """The box to erase in a side x side picture, or None. `u` holds `ERASING_DRAWS` uniform numbers."""
    if u[0] >= config.prob:
        return None
    if config.placement == "clipped":
        return _clipped_box(config, side, u[1:5])
    for attempt in range(_ATTEMPTS):
        box = _inside_box(config, side, u[1 + 4 * attempt : 5 + 4 * attempt])
        if box is not None:
            return box
    return None


def _box_sides(config: RandomErasingConfig, side: int, u: Sequence[float]) -> tuple[float, float]:
    """Height and width: uniform area, log-uniform height / width."""
    area = (config.min_area + (config.max_area - config.min_area) * u[0]) * side * side
    aspect = math.exp(math.log(config.min_aspect) * (1 - 2 * u[1]))
    return math.sqrt(area * aspect), math.sqrt(area / aspect)


def _inside_box(config: RandomErasingConfig, side: int, u: Sequence[float]) -> Box | None:
    """timm: whole pixels, the box inside the picture and smaller than it on both axes."""
    h, w = (round(length) for length in _box_sides(config, side, u))
    if h >= side or w >= side:
        return None
    return Box(int(u[2] * (side - h + 1)), int(u[3] * (side - w + 1)), h, w)


def _clipped_box(config: RandomErasingConfig, side: int, u: Sequence[float]) -> Box:
    """NesT: a centre anywhere in the picture; the pixels whose index lies within half a side of it."""
    h, w = _box_sides(config, side, u)
    top, bottom = _span(u[2] * side, h / 2, side)
    left, right = _span(u[3] * side, w / 2, side)
    return Box(top, left, bottom - top, right - left)


def _span(middle: float, half: float, side: int) -> tuple[int, int]:
    """Indices i of 0..side-1 with middle - half < i < middle + half, as a half-open range."""
    first = max(math.floor(middle - half) + 1, 0)
    return first, max(min(math.ceil(middle + half), side), first)
