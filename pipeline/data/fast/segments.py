"""Segments of a JPEG between restart markers, copied by a compiled loop."""

from __future__ import annotations

import numba
import numpy as np

_SIGNATURE = "int64(Array(uint8, 1, 'C', readonly=True), int64, int64, int64, int64, int64, int64, uint8[::1])"


@numba.njit(_SIGNATURE, cache=True, nogil=True, boundscheck=False)
def copy(data, scan, per_row, top, bottom, left, right, out):
    """Copy the segments of rows `top` to `bottom` and places `left` to `right` of each, and number their markers anew.

    Args:
        data: a JPEG.
        scan: where its coded bytes begin.
        per_row: segments in a row.
        out: as long as `data`; takes the segments from `scan` on, and the end mark.

    Returns:
        Where `out` ends; 0 when the markers are not in order, or too few.
    """
    size, segment, copied = scan, 0, 0
    inside = top == 0 and left == 0
    last = (bottom - 1) * per_row + right - 1
    end = len(data) - 1
    at = np.uint64(scan)
    while at < end:
        value = data[at]
        if value == 0xFF:
            marker = data[at + np.uint64(1)]
            if marker == 0xD9 or (marker & 0xF8) == 0xD0:
                if inside:
                    copied += 1
                if segment == last:
                    out[size], out[size + 1] = 0xFF, 0xD9
                    return size + 2
                if marker == 0xD9 or marker & 7 != segment & 7:
                    return 0
                segment += 1
                row, place = segment // per_row, segment % per_row
                inside = top <= row and left <= place < right
                if inside and copied:
                    out[size], out[size + 1] = 0xFF, 0xD0 + (copied - 1) % 8
                    size += 2
                at += np.uint64(2)
                continue
        if inside:
            out[size] = value
            size += 1
        at += np.uint64(1)
    return 0
