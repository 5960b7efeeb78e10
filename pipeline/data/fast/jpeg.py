"""Parts of a JPEG without decoding the rest: a smaller JPEG is put together from the bytes that are needed.

Two things make that possible without touching a coefficient. Rows below the last one needed are left away by a smaller
height in the header. And where restart markers divide the data into segments that fit into a row of blocks (`rookery
prep --resize` writes such files), the segments of a rectangle are copied: each of them can be decoded on its own.

Numbers of markers and fields: ITU-T T.81, annex B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.data.augment.crop import Box
from pipeline.data.augment.lazy import LazyModule

segments = LazyModule("pipeline.data.fast.segments")

MAGIC = b"\xff\xd8\xff"
_END = b"\xff\xd9"
_BASELINE, _OTHER_FRAMES, _INTERVAL, _SCAN = 0xC0, (0xC1, 0xC2, 0xC3), 0xDD, 0xDA
# A decoder makes a pixel out of the samples of chroma around it, which lie up to so many pixels away.
_AROUND = 2
# Where more than this share of the blocks is needed, to decode them all takes no longer than to pick them out.
_WORTHWHILE = 0.9


class _Layout(NamedTuple):
    """Where things are in a baseline JPEG with 1 or 3 components.

    Attributes:
        frame: offset of the frame header's marker.
        scan: offset of the first coded byte.
        width, height: of the picture.
        block_width, block_height: pixels of a coded unit, the smallest part that can be decoded.
        interval: units between restart markers; 0: there are none.
    """

    frame: int
    scan: int
    width: int
    height: int
    block_width: int
    block_height: int
    interval: int


def cut_out(data: bytes, wanted: Callable[[int, int], Box]) -> tuple[bytes | memoryview, Box, int, int] | None:
    """A JPEG of a part of a picture that holds the wanted one, each wanted pixel as in the whole picture.

    Args:
        wanted: (width, height) of the picture to the part that is needed.

    Returns:
        The JPEG, where its picture lies in the whole one, width and height of that. None: not that kind of JPEG, or not
        worthwhile. The memory is written again by the next call.
    """
    # Without its end mark it is cut short, which decoding part of it would not show.
    layout = _layout(data) if _END in data[-64:] else None
    if layout is None:
        return None
    _, scan, width, height, block_width, block_height, interval = layout
    box = wanted(width, height)
    columns, rows = -(-width // block_width), -(-height // block_height)
    top = max(box.top - _AROUND, 0) // block_height
    bottom = min(-(-(box.top + box.height + _AROUND) // block_height), rows)
    left, right = 0, columns
    if 0 < interval <= columns and columns % interval == 0:
        left = max(box.left - _AROUND, 0) // block_width // interval * interval
        right = min(-(-(box.left + box.width + _AROUND) // block_width), columns)
        right = -(-right // interval) * interval
    else:
        top, interval = 0, 0
    if (bottom - top) * (right - left) > _WORTHWHILE * rows * columns:
        return None
    part = Box(
        top * block_height,
        left * block_width,
        min(bottom * block_height, height) - top * block_height,
        min(right * block_width, width) - left * block_width,
    )
    header = _resized(data[:scan], layout.frame, part)
    if not interval:
        return header + data[scan:], part, width, height
    target = _scratch(len(data))
    target[:scan] = np.frombuffer(header, np.uint8)
    per_row = columns // interval
    size = segments.copy(
        np.frombuffer(data, np.uint8), scan, per_row, top, bottom, left // interval, right // interval, target
    )
    return (target[:size].data, part, width, height) if size else None


_memory = np.empty(0, np.uint8)


def _scratch(size: int) -> np.ndarray:
    global _memory
    if len(_memory) < size:
        _memory = np.empty(2 * size, np.uint8)
    return _memory


def _resized(header: bytes, frame: int, part: Box) -> bytes:
    sides = part.height.to_bytes(2, "big") + part.width.to_bytes(2, "big")
    return header[: frame + 5] + sides + header[frame + 9 :]


def _layout(data: bytes) -> _Layout | None:
    if data[:3] != MAGIC:
        return None
    at, frame, interval = 2, 0, 0
    block = width = height = 0
    while at + 20 < len(data) and data[at] == 0xFF:
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SCAN:
            scan = at + 2 + size
            # One scan with all components; a file of several would need the same done to each.
            if not frame or data[at + 4] != data[frame + 9] or scan >= len(data):
                return None
            return _Layout(frame, scan, width, height, 8 * (block >> 4), 8 * (block & 15), interval)
        if marker in _OTHER_FRAMES:
            return None
        if marker == _INTERVAL:
            interval = int.from_bytes(data[at + 4 : at + 6], "big")
        if marker == _BASELINE:
            frame, components = at, data[at + 9]
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            if components not in (1, 3):
                return None
            # One component has blocks of 8 x 8, whatever sampling it names.
            block = 0x11 if components == 1 else _largest(data, at, components)
            if not (block and width and height):
                return None
        at += 2 + size
    return None


def _largest(data: bytes, frame: int, components: int) -> int:
    """The two factors of sampling of a unit, in the two halves of a byte; 0: not the usual ones."""
    factors = [data[frame + 11 + 3 * i] for i in range(components)]
    across, down = max(f >> 4 for f in factors), max(f & 15 for f in factors)
    return across << 4 | down if across in (1, 2, 4) and down in (1, 2, 4) else 0
