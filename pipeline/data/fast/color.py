"""Colour jitter of an 8-bit picture, compiled: `augment.color`'s adjustments, then rounded to 8 bits again.

The plain path goes on in floats; rounding moves a value by at most half of 1/255, plus the float's own last digits.
"""

from __future__ import annotations

import numba
import numpy as np

from pipeline.data.augment.color import ColorJitter

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_CODES = {"brightness": _BRIGHTNESS, "contrast": _CONTRAST, "saturation": _SATURATION, "hue": _HUE}
_ONE, _TWO, _THREE = np.uint64(1), np.uint64(2), np.uint64(3)
# Pixels of a block, a multiple of those of a sum: three planes of floats in 24 KB.
_BLOCK = 2048


@numba.njit(cache=True, nogil=True, inline="always")
def _cut(value):
    return min(max(value, np.float32(0)), np.float32(1))


@numba.njit(cache=True, nogil=True, inline="always")
def _rounded(value):
    return np.uint8(np.int32(value * np.float32(255) + np.float32(0.5)))


@numba.njit("void(float32[::1], float32)", cache=True, nogil=True)
def _brighten(plane, factor):
    for i in range(len(plane)):
        plane[i] = _cut(plane[i] * factor)


@numba.njit("void(float32[:, ::1], int64, int64, float64[::1])", cache=True, nogil=True)
def _add_up(planes, start, stop, total):
    """Add the pixels from `start` to `stop` to each plane's total.

    Sums of 256 values in single precision, added up in double: as exact as needed, and vectorised. All planes at once,
    because a sum waits for the one before it.
    """
    red, green, blue = planes[0], planes[min(1, len(planes) - 1)], planes[len(planes) - 1]
    for first in range(start, stop, 256):
        r, g, b = (
            red[first : min(first + 256, stop)],
            green[first : min(first + 256, stop)],
            blue[first : min(first + 256, stop)],
        )
        r0, r1, r2, r3, g0, g1, g2, g3, b0, b1, b2, b3 = np.zeros(12, np.float32)
        whole = len(r) // 4
        for i in range(whole):
            k = np.uint64(4 * i)
            r0 += r[k]
            r1 += r[k + _ONE]
            r2 += r[k + _TWO]
            r3 += r[k + _THREE]
            g0 += g[k]
            g1 += g[k + _ONE]
            g2 += g[k + _TWO]
            g3 += g[k + _THREE]
            b0 += b[k]
            b1 += b[k + _ONE]
            b2 += b[k + _TWO]
            b3 += b[k + _THREE]
        for i in range(4 * whole, len(r)):
            r0 += r[i]
            g0 += g[i]
            b0 += b[i]
        total[0] += (r0 + r1) + (r2 + r3)
        total[1] += (g0 + g1) + (g2 + g3)
        total[2] += (b0 + b1) + (b2 + b3)


@numba.njit("void(float32[::1], float32, float32)", cache=True, nogil=True)
def _contrast(plane, mean, factor):
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


@numba.njit("void(uint8[::1], float32[::1], float32[::1], float32[::1])", cache=True, nogil=True)
def _load(values, red, green, blue):
    for i in range(len(red)):
        k = np.uint64(3 * i)
        red[i] = np.float32(values[k]) / np.float32(255)
        green[i] = np.float32(values[k + _ONE]) / np.float32(255)
        blue[i] = np.float32(values[k + _TWO]) / np.float32(255)


@numba.njit("void(float32[::1], float32[::1], float32[::1], uint8[::1])", cache=True, nogil=True)
def _store(red, green, blue, values):
    for i in range(len(red)):
        k = np.uint64(3 * i)
        values[k] = _rounded(red[i])
        values[k + _ONE] = _rounded(green[i])
        values[k + _TWO] = _rounded(blue[i])


@numba.njit("int64(int64[::1], int64)", cache=True, nogil=True)
def _next_contrast(codes, start):
    for i in range(start, len(codes)):
        if codes[i] == _CONTRAST:
            return i
    return len(codes)


@numba.njit("void(uint8[::1], int64[::1], float32[::1], boolean, float32[:, ::1])", cache=True, nogil=True)
def _jitter(values, codes, amounts, gray, planes):
    """All adjustments of some thousand pixels before the next ones: they stay in the nearest cache meanwhile.

    Contrast takes the mean of all pixels. So there is one pass over the picture for what comes before it, and one for
    itself and the rest.
    """
    channels = len(planes)
    pixels = len(values) // channels
    total, mean = np.zeros(3, np.float64), np.zeros(3, np.float32)
    first, end = 0, _next_contrast(codes, 0)
    loaded = False
    while True:
        last = end == len(codes)
        for start in range(0, pixels, _BLOCK):
            stop = min(start + _BLOCK, pixels)
            of_picture = values[channels * start : channels * stop]
            # What a later pass goes on with needs a place of its own.
            at = start if loaded or not last else 0
            to = at + stop - start
            red, green, blue = planes[0, at:to], planes[min(1, channels - 1), at:to], planes[channels - 1, at:to]
            if not loaded and channels == 3:
                _load(of_picture, red, green, blue)
            elif not loaded:
                red[:] = of_picture / np.float32(255)
            for step in range(first, end):
                code, amount = codes[step], amounts[step]
                if code == _BRIGHTNESS:
                    for c in range(channels):
                        _brighten(planes[c, at:to], amount)
                elif code == _CONTRAST:
                    for c in range(channels):
                        _contrast(planes[c, at:to], mean[c], amount)
                elif channels == 3 and code == _SATURATION:
                    _saturate(red, green, blue, amount)
                elif channels == 3:
                    _turn(red, green, blue, amount)
            if not last:
                _add_up(planes, at, to, total)
            elif channels == 3:
                if gray:
                    _to_grey(red, green, blue)
                _store(red, green, blue, of_picture)
            else:
                for i in range(len(red)):
                    of_picture[i] = _rounded(red[i])
        if last:
            return
        for c in range(channels):
            mean[c] = np.float32(total[c] / pixels)
            total[c] = 0
        loaded = True
        first, end = end, _next_contrast(codes, end + 1)


def apply_color_jitter(picture: np.ndarray, jitter: ColorJitter, planes: np.ndarray) -> None:
    """Jitter a picture in place.

    Args:
        picture: (H, W, C) uint8.
        planes: (C, H * W) float32, scratch.
    """
    if jitter.adjustments or (jitter.gray and picture.shape[2] == 3):
        codes = np.array([_CODES[name] for name, _ in jitter.adjustments], np.int64)
        amounts = np.array([amount for _, amount in jitter.adjustments], np.float32)
        _jitter(picture.reshape(-1), codes, amounts, jitter.gray, planes)
