"""Colour jitter of an 8-bit picture, compiled: `augment.color`'s adjustments, then rounded to 8 bits again.

The plain path goes on in floats; rounding moves a value by at most half of 1/255, plus the float's own last digits.
"""

from __future__ import annotations

import numba
import numpy as np

from pipeline.data.augment.color import ColorJitter

_CODES = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}


@numba.njit(cache=True, nogil=True, inline="always")
def _cut(value):
    return min(max(value, np.float32(0)), np.float32(1))


@numba.njit("void(float32[:, ::1], float32)", cache=True, nogil=True)
def _brighten(planes, factor):
    for plane in planes:
        for i in range(len(plane)):
            plane[i] = _cut(plane[i] * factor)


@numba.njit("void(float32[:, ::1], float32)", cache=True, nogil=True)
def _contrast(planes, factor):
    for plane in planes:
        # Eight sums side by side, which the processor can add at once.
        sums = np.zeros(8, np.float64)
        whole = len(plane) // 8 * 8
        for i in range(0, whole, 8):
            for j in range(8):
                sums[j] += plane[i + j]
        total = sums.sum()
        for i in range(whole, len(plane)):
            total += plane[i]
        mean = np.float32(total / len(plane))
        for i in range(len(plane)):
            plane[i] = _cut(mean + factor * (plane[i] - mean))


@numba.njit("void(float32[::1], float32[::1], float32[::1], float32)", cache=True, nogil=True)
def _saturate(red, green, blue, factor):
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value, low = max(r, g, b), min(r, g, b)
        largest = value / max(value - low, np.float32(1e-30))
        scale = min(largest, factor)
        red[i] = _cut(value - (value - r) * scale)
        green[i] = _cut(value - (value - g) * scale)
        blue[i] = _cut(value - (value - b) * scale)


@numba.njit(cache=True, nogil=True, inline="always")
def _fall(place):
    # `place` is in (-3, 11): back onto the circle of six without a division.
    place += np.float32(6) if place < np.float32(0) else np.float32(0)
    place -= np.float32(6) if place >= np.float32(6) else np.float32(0)
    return _cut(min(place, np.float32(4) - place))


@numba.njit("void(float32[::1], float32[::1], float32[::1], float32)", cache=True, nogil=True)
def _turn(red, green, blue, turns):
    six = np.float32(6) * turns
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, g, b)
        chroma = value - min(r, g, b)
        divisor = max(chroma, np.float32(1e-30))
        of_red = (g - b) / divisor
        of_green = (b - r) / divisor + np.float32(2)
        of_blue = (r - g) / divisor + np.float32(4)
        hue = (of_red if value == r else of_green if value == g else of_blue) + six
        red[i] = value - chroma * _fall(hue + np.float32(5))
        green[i] = value - chroma * _fall(hue + np.float32(3))
        blue[i] = value - chroma * _fall(hue + np.float32(1))


@numba.njit("void(float32[::1], float32[::1], float32[::1])", cache=True, nogil=True)
def _to_grey(red, green, blue):
    for i in range(len(red)):
        grey = np.float32(0.2989) * red[i] + np.float32(0.587) * green[i] + np.float32(0.114) * blue[i]
        red[i] = green[i] = blue[i] = grey


@numba.njit("void(uint8[:, :, ::1], int64[::1], float32[::1], boolean, float32[:, ::1])", cache=True, nogil=True)
def _jitter(picture, codes, amounts, gray, planes):
    rows, columns, channels = picture.shape
    n = rows * columns
    flat = picture.reshape(n, channels)
    for c in range(channels):
        for i in range(n):
            planes[c, i] = np.float32(flat[i, c]) / np.float32(255)
    for k in range(len(codes)):
        if codes[k] == 0:
            _brighten(planes, amounts[k])
        elif codes[k] == 1:
            _contrast(planes, amounts[k])
        elif channels == 3 and codes[k] == 2:
            _saturate(planes[0], planes[1], planes[2], amounts[k])
        elif channels == 3:
            _turn(planes[0], planes[1], planes[2], amounts[k])
    if gray and channels == 3:
        _to_grey(planes[0], planes[1], planes[2])
    for c in range(channels):
        for i in range(n):
            flat[i, c] = np.uint8(planes[c, i] * np.float32(255) + np.float32(0.5))


def apply_color_jitter(picture: np.ndarray, jitter: ColorJitter, planes: np.ndarray) -> None:
    """Jitter a picture in place.

    Args:
        picture: (H, W, C) uint8.
        planes: (C, H * W) float32, scratch.
    """
    if jitter.adjustments or (jitter.gray and picture.shape[2] == 3):
        codes = np.array([_CODES[name] for name, _ in jitter.adjustments], np.int64)
        amounts = np.array([amount for _, amount in jitter.adjustments], np.float32)
        _jitter(picture, codes, amounts, jitter.gray, planes)
