"""RandAugment's operations on 8-bit arrays: what `augment.randaugment` does with Pillow, pixel by pixel the same.

Operations that treat every value alike become tables of 256 values, geometric ones a warp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.augment.crop import PixelMap
from pipeline.data.augment.randaugment import DrawnOp
from pipeline.data.fast import kernels

_VALUES = np.arange(256)
_SINGLES = _VALUES.astype(np.float32)
_WARPS = {
    Image.Resampling.NEAREST: kernels.warp_nearest,
    Image.Resampling.BILINEAR: kernels.warp_bilinear,
    Image.Resampling.BICUBIC: kernels.warp_bicubic,
}


def apply_op(picture: np.ndarray, spare: np.ndarray, op: DrawnOp, fill: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Apply one operation.

    Args:
        picture: (H, W, C) uint8; may be written to.
        spare: of the same shape; may be written to.
        op: what to do.
        fill: (C,) uint8, colour of uncovered pixels.

    Returns:
        The array that holds the result, then the other one.
    """
    moves = op.moves(picture.shape[1], picture.shape[0])
    if moves is not None:
        _WARPS[op.resample](picture, matrix(moves, op.resample), fill, spare)
        return spare, picture
    name = op.name.removesuffix("Increasing")
    if name == "Color":
        kernels.saturate(picture, op.arg)
    elif name == "Sharpness":
        kernels.sharpen(picture, op.arg, spare)
        return spare, picture
    elif name != "Identity":
        kernels.apply_tables(picture, _table(name, picture, op).reshape(-1, 256))
    return picture, spare


def fixed_table(op: DrawnOp) -> np.ndarray | None:
    """(256,) uint8, what replaces each value where that doesn't depend on the picture; None: it stays.

    Raises:
        KeyError: an operation that is no such table.
    """
    name = op.name.removesuffix("Increasing")
    return None if name == "Identity" else _table(name, None, op)


def _table(name: str, picture: np.ndarray | None, op: DrawnOp) -> np.ndarray:
    tables = _FIXED_TABLES if picture is None else _TABLES
    # Values are cut to whole numbers.
    table = tables[name](picture, 0.0 if op.arg is None else op.arg)
    return np.maximum(np.minimum(table, 255), 0).astype(np.uint8)


def matrix(moves: PixelMap, resample: Image.Resampling) -> np.ndarray:
    """(6,) float64, the map that Pillow really follows."""
    a, b, c, d, e, f = moves
    if resample == Image.Resampling.NEAREST and (a, b, d, e) == (1, 0, 0, 1):
        # Pillow shifts by whole pixels, and would round otherwise in fixed point.
        c, f = math.floor(c + 0.5), math.floor(f + 0.5)
    return np.array([a, b, c, d, e, f], np.float64)


def _blended(low: int, factor: float) -> np.ndarray:
    """(256,) distance of every value from `low`, times `factor`, in single precision."""
    return np.float32(low) + np.float32(factor) * (_SINGLES - np.float32(low))


def _auto_contrast(picture: np.ndarray, _arg: float) -> np.ndarray:
    tables: list[np.ndarray] = []
    for counts in kernels.histograms(picture):
        [present] = counts.nonzero()
        low, high = int(present[0]), int(present[-1])
        if high <= low:
            tables.append(_VALUES)
            continue
        scale = 255.0 / (high - low)
        tables.append(_VALUES * scale + -low * scale)
    return np.stack(tables)


def _equalize(picture: np.ndarray, _arg: float) -> np.ndarray:
    tables = []
    for counts in kernels.histograms(picture):
        [present] = counts.nonzero()
        step = int(counts.sum() - counts[present[-1]]) // 255
        if len(present) <= 1 or not step:
            tables.append(_VALUES)
            continue
        tables.append((step // 2 + np.cumsum(counts) - counts) // step)
    return np.stack(tables)


def _solarize(_picture: np.ndarray | None, threshold: float) -> np.ndarray:
    return np.where(threshold > _VALUES, _VALUES, 255 - _VALUES)


def _solarize_add(_picture: np.ndarray | None, added: float) -> np.ndarray:
    return np.where(_VALUES < 128, np.minimum(255, _VALUES + int(added)), _VALUES)


def _contrast(picture: np.ndarray, factor: float) -> np.ndarray:
    pixels = picture.shape[0] * picture.shape[1]
    return _blended(int(kernels.grey_sum(picture) / pixels + 0.5), factor)


# Those that don't look at the picture: (256,).
_FIXED_TABLES: dict[str, Callable[[Any, float], np.ndarray]] = {
    "Invert": lambda _picture, _arg: 255 - _VALUES,
    "Posterize": lambda _picture, bits: _VALUES & (0xFF00 >> int(bits)),
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Brightness": lambda _picture, factor: _blended(0, factor),
}
# (256,) one table for all channels, or (C, 256).
_TABLES = _FIXED_TABLES | {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Contrast": _contrast,
}
