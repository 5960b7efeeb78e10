"""Where a point of the augmented picture was in the original one: what a dense label has to know of the augmentation.

Coordinates are parts of a picture's width and height, (0, 0) its upper left corner, (1, 1) its lower right one. A
*warp* is a (2, 3) matrix that takes a point of a picture after an operation to where it was before it. Several
operations are kept as several warps: what any of them moved in from outside its picture has no original place.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.data.augment.crop import Box, PixelMap

IDENTITY = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
FLIP = np.array([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


def crop_warp(box: Box, width: int, height: int) -> np.ndarray:
    """Of cutting `box` out of a width x height picture; it may reach over the edge."""
    return np.array([[box.width / width, 0, box.left / width], [0, box.height / height, box.top / height]])


def mirrored(box: Box, width: int) -> Box:
    """Where a box of a picture is after the picture was mirrored."""
    return Box(box.top, width - box.left - box.width, box.height, box.width)


def swapped_axes(warp: np.ndarray) -> np.ndarray:
    """The crop that the official code reads labels from: as wide as this one is high, as far left as it is down."""
    return np.array([[warp[1, 1], 0, warp[1, 2]], [0, warp[0, 0], warp[0, 2]]])


def pixel_warp(pixels: PixelMap, width: int, height: int) -> np.ndarray:
    """Of a Pillow transform of a width x height picture."""
    a, b, c, d, e, f = pixels
    return np.array([[a, b * height / width, c / width], [d * width / height, e, f / height]])


def rotation(degrees: float, width: int, height: int) -> PixelMap:
    """Pillow's `rotate`: counter-clockwise about the centre; with its rounding, so that the same pixels are met."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)
