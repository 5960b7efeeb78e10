"""Colour jitter of an 8-bit picture, compiled: `augment.color`'s adjustments, then rounded to 8 bits again.

The plain path goes on in floats; rounding moves a value by at most half of 1/255, plus the float's own last digits.
"""

from __future__ import annotations

import numba
import numpy as np

from pipeline.data.augment.color import ColorJitter

_CODES = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}
_ONE, _TWO, _THREE = np.uint64(1), np.uint64(2), np.uint64(3)


@numba.njit(cache=True, nogil=True, inline="always")
def _cut(value):
    return min(max(value, np.float32(0)), np.float32(1))


@numba.njit(cache=True, nogil=True, inline="always")
def _rounded(value):
    return np.uint8(np.int32(value * np.float32(255) + np.float32(0.5)))


@numba.njit("void(float32[:, ::1], float32)", cache=True, nogil=True)
def _brighten(planes, factor):
    for c in range(len(planes)):  # iterating gives planes of unknown strides
        plane = planes[c]
        for i in range(len(plane)):
            plane[i] = _cut(plane[i] * factor)


@numba.njit("void(float32[:, ::1], float64[::1])", cache=True, nogil=True)
def _add_up(planes, total):
    """Add the pixels of three planes to their totals.

    Sums of 256 values in single precision, added up in double: as exact as needed, and vectorised. All planes at once,
    because each addition waits for the one before it.
    """
    for start in range(0, planes.shape[1], 256):
        stop = min(start + 256, planes.shape[1])
        red, green, blue = planes[0, start:stop], planes[1, start:stop], planes[2, start:stop]
        r0, r1, r2, r3, g0, g1, g2, g3, b0, b1, b2, b3 = np.zeros(12, np.float32)
        whole = (stop - start) // 4
        for i in range(whole):
            k = np.uint64(4 * i)
            r0 += red[k]
            r1 += red[k + _ONE]
            r2 += red[k + _TWO]
            r3 += red[k + _THREE]
            g0 += green[k]
            g1 += green[k + _ONE]
            g2 += green[k + _TWO]
            g3 += green[k + _THREE]
            b0 += blue[k]
            b1 += blue[k + _ONE]
            b2 += blue[k + _TWO]
            b3 += blue[k + _THREE]
        for i in range(4 * whole, stop - start):
            r0 += red[i]
            g0 += green[i]
            b0 += blue[i]
        total[0] += (r0 + r1) + (r2 + r3)
        total[1] += (g0 + g1) + (g2 + g3)
        total[2] += (b0 + b1) + (b2 + b3)


@numba.njit("void(float32[:, ::1], float32)", cache=True, nogil=True)
def _contrast(planes, factor):
    total = np.zeros(len(planes), np.float64)
    if len(planes) == 3:
        _add_up(planes, total)
    else:
        for value in planes[0]:
            total[0] += value
    for c in range(len(planes)):
        plane, mean = planes[c], np.float32(total[c] / planes.shape[1])
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
        apart = g - b if value == r else b - r if value == g else r - g
        start = np.float32(0) if value == r else np.float32(2) if value == g else np.float32(4)
        hue = apart / max(chroma, np.float32(1e-30)) + start + six
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
    flat = picture.reshape(picture.size)
    red, green, blue = planes[0], planes[min(1, channels - 1)], planes[channels - 1]
    for i in range(rows * columns):
        k = np.uint64(channels * i)
        red[i] = np.float32(flat[k]) / np.float32(255)
        if channels == 3:
            green[i] = np.float32(flat[k + _ONE]) / np.float32(255)
            blue[i] = np.float32(flat[k + _TWO]) / np.float32(255)
    for code, amount in zip(codes, amounts):  # noqa: B905  (Numba's zip takes no more)
        if code == 0:
            _brighten(planes, amount)
        elif code == 1:
            _contrast(planes, amount)
        elif channels == 3 and code == 2:
            _saturate(red, green, blue, amount)
        elif channels == 3:
            _turn(red, green, blue, amount)
    if gray and channels == 3:
        _to_grey(red, green, blue)
    for i in range(rows * columns):
        k = np.uint64(channels * i)
        flat[k] = _rounded(red[i])
        if channels == 3:
            flat[k + _ONE] = _rounded(green[i])
            flat[k + _TWO] = _rounded(blue[i])


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
