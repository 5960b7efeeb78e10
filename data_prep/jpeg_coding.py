"""How the units of a baseline JPEG are coded: what its frame, scan and Huffman segments say.

Fields: ITU-T T.81, annex B; codes: annex C. A segment here is what follows its marker and length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

BASELINE, HUFFMAN, INTERVAL, SCAN = 0xC0, 0xC4, 0xDD, 0xDA
# Frames of other kinds: progressive, lossless, arithmetic, ...
OTHER_FRAMES = frozenset(range(0xC1, 0xD0)) - {HUFFMAN, 0xC8, 0xCC}
# Differences of 8-bit pictures have the categories 0 to 11 (annex F).
CATEGORIES = 12


class Units(NamedTuple):
    """The coded units of a scan of all components, the smallest parts that can be decoded.

    Attributes:
        width, height: of the picture, in pixels.
        block_width, block_height: pixels of a unit.
        blocks: (n, 3) int64, for each block of a unit: component, DC table, AC table.
    """

    width: int
    height: int
    block_width: int
    block_height: int
    blocks: np.ndarray


class HuffmanTable(NamedTuple):
    """A Huffman table.

    Attributes:
        kind: 0: DC, 1: AC.
        number: 0 or 1.
        counts: how many codes have 1, 2, ... 16 bits.
        symbols: of the codes, in their order.
    """

    kind: int
    number: int
    counts: bytes
    symbols: bytes

    def codes(self) -> Iterator[tuple[int, int, int]]:
        """Symbol, length and code of each."""
        for symbol, (length, code) in zip(self.symbols, codes(self.counts), strict=True):
            yield symbol, length, code


def codes(counts: bytes) -> Iterator[tuple[int, int]]:
    """Length and code of the symbols of a table, in their order."""
    code = 0
    for length, count in enumerate(counts, 1):
        for _ in range(count):
            yield length, code
            code += 1
        code <<= 1


def units(frame: bytes, scan: bytes) -> Units | None:
    """The units of 1 or 3 components in one scan; None: others, or damage.

    Args:
        frame: segment of the frame header.
        scan: segment of the scan header.
    """
    height, width = (int.from_bytes(frame[i : i + 2], "big") for i in (1, 3))
    found = _layout(frame[:1] + frame[5:], scan) if height and width else None
    return None if found is None else Units(width, height, *found)


@lru_cache(64)
def _layout(frame: bytes, scan: bytes) -> tuple[int, int, np.ndarray] | None:
    """All of `Units` but the size of the picture.

    Args:
        frame: its segment without the size.
    """
    components = frame[1] if len(frame) > 1 else 0
    if components not in (1, 3) or len(frame) != 2 + 3 * components or frame[0] != 8:
        return None
    if len(scan) != 4 + 2 * components or scan[0] != components or scan[-3:] != b"\x00\x3f\x00":
        return None
    factors = [(frame[3 + 3 * i] >> 4, frame[3 + 3 * i] & 15) for i in range(components)]
    if components == 1:  # has blocks of 8 x 8, whatever it says
        factors = [(1, 1)]
    across, down = (max(f[side] for f in factors) for side in (0, 1))
    if not (across in (1, 2, 4) and down in (1, 2, 4) and all(x and y for x, y in factors)):
        return None
    blocks = []
    for i, (x, y) in enumerate(factors):
        if scan[1 + 2 * i] != frame[2 + 3 * i] or scan[2 + 2 * i] & 0xEE:
            return None
        blocks += [(i, scan[2 + 2 * i] >> 4, scan[2 + 2 * i] & 15)] * (x * y)
    return 8 * across, 8 * down, np.array(blocks, np.int64)


def huffman_tables(segment: bytes) -> list[HuffmanTable] | None:
    """The tables of a segment; None if they are not those of a baseline JPEG."""
    at, tables = 0, []
    while at + 17 <= len(segment):
        kind, number = segment[at] >> 4, segment[at] & 15
        counts = segment[at + 1 : at + 17]
        symbols = segment[at + 17 : at + 17 + sum(counts)]
        if kind > 1 or number > 1 or len(symbols) != sum(counts) or (kind == 0 and max(symbols, default=0) > 15):
            return None
        if any(code >> length for length, code in codes(counts)):
            return None
        at += 17 + len(symbols)
        tables.append(HuffmanTable(kind, number, counts, symbols))
    return tables if at == len(segment) else None
