"""The scan of a baseline JPEG: the blocks of a rectangle of its units are decoded, those before them only passed.

Where a unit ends shows only when all codes before it are read. But what a coefficient's bits say does not matter there,
only how many they are, and a table tells how far several coefficients reach together.

Order of blocks and coefficients: ITU-T T.81, annexes A and F.
"""

from __future__ import annotations

import numba
import numpy as np

from pipeline.data.fast.huffman import BITS, is_ac, signed, symbol
from pipeline.data.fast.idct import fill, transform
from pipeline.data.fast.instructions import copy_eight

# More bytes than a unit of ten blocks can take, with 31 bits for each of 64 coefficients.
_UNIT = 4096
_u64 = np.uint64
_REST = 64 - BITS


def _zigzag() -> np.ndarray:
    """The place of each coefficient in its block, in the order in which they are coded."""
    cells = [(row, column) for row in range(8) for column in range(8)]
    cells.sort(key=lambda cell: (sum(cell), cell[sum(cell) % 2 == 0]))
    return np.array([8 * row + column for row, column in cells], np.int64)


ZIGZAG = _zigzag()


@numba.njit(inline="always")
def _four(data, at):
    """Four bytes as a number."""
    i = _u64(at)  # what has no sign can't mean a place from the end, which would be looked at each time
    high = _u64(data[i]) << _u64(24) | _u64(data[i + _u64(1)]) << _u64(16)
    return high | _u64(data[i + _u64(2)]) << _u64(8) | _u64(data[i + _u64(3)])


@numba.njit(inline="always")
def _eight(data, at):
    return _four(data, at) << _u64(32) | _four(data, at + 4)


@numba.njit(
    "Tuple((int64, int64, int64))(Array(uint8, 1, 'C', readonly=True), int64, int64, int64, uint8[::1], int64[::1], "
    "int64)",
    cache=True,
    nogil=True,
    boundscheck=False,
)
def _unstuff(data, taken, filled, enough, plain, marks, marked):
    """Copy coded bytes without the zeros behind those of 255, and without restart markers.

    Args:
        taken: where to begin in `data`.
        filled: bytes in `plain`, which grow to `enough`, or somewhat more.
        marks: takes the places in `plain` where markers were.
        marked: how many.

    Returns:
        `taken`, `filled` and `marked` anew; `taken` is beyond `data` behind the last byte.
    """
    end = len(data) - 1
    while filled < enough:
        while taken + 8 <= end and filled < enough:
            word = copy_eight(data, taken, plain, filled)  # type: ignore[call-arg,var-annotated]
            if (~word - _u64(0x0101010101010101)) & word & _u64(0x8080808080808080) != 0:  # one of the bytes is 255
                break
            taken += 8
            filled += 8
        for _ in range(8):
            if taken >= end:
                return end + 2, filled, marked
            value = data[_u64(taken)]
            if value == 0xFF and data[_u64(taken + 1)] != 0:
                if data[_u64(taken + 1)] != 0xD0 + (marked & 7) or marked >= len(marks):
                    return end + 2, filled, marked
                marks[marked] = filled
                marked += 1
                taken += 2
                continue
            plain[_u64(filled)] = value
            taken += 2 if value == 0xFF else 1
            filled += 1
    return taken, filled, marked


@numba.njit(
    "int64(int64[:, ::1], int64, int64, int64, int64, int64[:, ::1], int64[:, ::1])",
    cache=True,
    nogil=True,
    boundscheck=False,
)
def arrange(units, across, down, rows, columns, planes, blocks):
    """Where the pixels of rows x columns units go: those of each component into a plane of its own.

    Args:
        units: (n, 3), for each block of a unit: component, DC table, AC table.
        across, down: blocks of luminance in a unit; of chrominance there is one.
        planes: (components, 2), takes where each plane starts, and how far it is from a row to the next.
        blocks: (n, 7), takes what `decode` wants of each block.

    Returns:
        The pixels of all planes.
    """
    start = 0
    for component in range(len(planes)):
        wide, high = (across, down) if component == 0 else (1, 1)
        stride = 8 * wide * columns
        planes[component, 0], planes[component, 1] = start, stride
        seen = 0
        for i in range(len(units)):
            if units[i, 0] == component:
                blocks[i, :3] = units[i]
                blocks[i, 3] = start // 8 + seen // wide * stride + seen % wide
                blocks[i, 4], blocks[i, 5], blocks[i, 6] = wide, high * stride, stride // 8
                seen += 1
        start += stride * 8 * high * rows
    return start


_SIGNATURE = (
    "int64(Array(uint8, 1, 'C', readonly=True), int64, int64, int64, int64, int64, int64, int64, int64[:, ::1], "
    "int32[:, ::1], uint16[:, ::1], int32[:, ::1], int32[:, ::1], uint16[:, ::1], int64[:, ::1], int64[:, ::1], "
    "uint8[:, ::1], uint8[::1], uint64[::1])"
)


@numba.njit(_SIGNATURE, cache=True, nogil=True, boundscheck=False)
def decode(
    data, scan, across, interval, top, bottom, left, right, blocks,
    steps, dc, ac, pairs, skip, limits, offsets, symbols, plain, planes,
):  # fmt: skip
    """Decode the units of rows `top` to `bottom` and columns `left` to `right` of each.

    Args:
        data: a baseline JPEG of one scan.
        scan: where its coded bytes begin.
        across: units in a row.
        interval: units between restart markers; 0: there are none.
        blocks: (n, 7), for each block of a unit: component, DC table, AC table, where its pixels of the first unit go
            in `planes`, how far from there those of the next unit, those of the next row of units, and
            the next row of pixels.
        steps: (components, 64), of each coefficient in the order of codes: what its value is multiplied with.
        dc, ac, pairs, skip, limits, offsets, symbols: `Tables`.
        plain: 8192 longer than `data`; written over.
        planes: takes the pixels, eight in a number.

    Returns:
        1; 0: damage, or numbers that no encoder makes of a picture, which decoders treat in different ways.
    """
    taken, filled, marked = scan, 0, 0
    marks = np.empty(across * bottom // interval + 1 if interval else 0, np.int64)
    at, buffer, have = 0, _u64(0), 0
    level = np.zeros(4, np.int64)
    work, turned = np.zeros(64, np.int32), np.zeros(64, np.int32)
    odd = 0
    unit = 0
    for row in range(bottom):
        for column in range(across):
            if filled - at < _UNIT and taken <= len(data):
                taken, filled, marked = _unstuff(data, taken, filled, filled + 2 * _UNIT, plain, marks, marked)
            if interval and unit and unit % interval == 0:
                at, buffer, have = (8 * at - have + 7) >> 3, _u64(0), 0
                if unit // interval > marked or marks[unit // interval - 1] != at:
                    return 0
                level[:] = 0
            unit += 1
            inside = row >= top and left <= column < right
            for block in range(len(blocks)):
                component, ac_table = _u64(blocks[block, 0]), _u64(blocks[block, 2])
                buffer |= _eight(plain, at) >> _u64(have)
                at, have = at + ((63 - have) >> 3), have | 56
                found = np.int64(dc[_u64(blocks[block, 1]), buffer >> _u64(_REST)])
                if found == 0:
                    found = symbol(np.int64(buffer >> _u64(48)), 16, blocks[block, 1], limits, offsets, symbols)
                    if found == 0:
                        return 0
                length, size = found & 31, found >> 5
                buffer <<= _u64(length)
                if size:
                    level[component] += signed(np.int64(buffer >> _u64(64 - size)), size)
                    buffer <<= _u64(size)
                have -= length + size
                k = 0
                if not inside:
                    while k < 63:
                        buffer |= _eight(plain, at) >> _u64(have)
                        at, have = at + ((63 - have) >> 3), have | 56
                        found = np.int64(skip[ac_table, buffer >> _u64(_REST)])
                        used, passed, end = found & 31, (found >> 5) & 127, found >> 12
                        if found == 0 or k + passed + end > 63:  # the next codes may be those of another block
                            found = symbol(
                                np.int64(buffer >> _u64(48)), 16, 2 + np.int64(ac_table), limits, offsets, symbols
                            )
                            if not is_ac(found):
                                return 0
                            run, size = found >> 9, (found >> 5) & 15
                            end = 0 if size or run else 1
                            used, passed = (found & 31) + size, 0 if end else run + 1
                        buffer <<= _u64(used)
                        have -= used
                        k += passed
                        if end:
                            break
                        # Of 56 bits the first took 26 at most, and what a table tells takes 22.
                        found = np.int64(skip[ac_table, buffer >> _u64(_REST)])
                        used, passed, end = found & 31, (found >> 5) & 127, found >> 12
                        if found != 0 and k + passed + end <= 63:
                            buffer <<= _u64(used)
                            have -= used
                            k += passed
                            if end:
                                break
                    if k > 63:
                        return 0
                    continue
                product = level[component] * steps[component, _u64(0)]
                odd |= (product + (1 << 13)) >> 14
                work[0] = product
                going = True
                while going and k < 63:
                    buffer |= _eight(plain, at) >> _u64(have)
                    at, have = at + ((63 - have) >> 3), have | 56
                    looks = 0
                    while looks < 4:  # at 12 bits
                        found = np.int64(pairs[ac_table, buffer >> _u64(_REST)])
                        used, passed, more, end = found & 31, (found >> 5) & 31, (found >> 10) & 31, (found >> 15) & 1
                        if found == 0 or k + passed + more + end > 63:  # the second may be of another block
                            break
                        looks += 1
                        buffer <<= _u64(used)
                        have -= used
                        if passed == 0:
                            going = False
                            break
                        k += passed
                        product = ((found << 40) >> 56) * steps[component, _u64(k)]
                        odd |= (product + (1 << 13)) >> 14
                        work[ZIGZAG[_u64(k)]] = product
                        k += more  # without a second one this is the first again
                        product = (found >> 24) * steps[component, _u64(k)]
                        odd |= (product + (1 << 13)) >> 14
                        work[ZIGZAG[_u64(k)]] = product
                        if end:
                            going = False
                            break
                    if looks:
                        continue
                    found = np.int64(ac[ac_table, buffer >> _u64(_REST)])
                    if found == 0:
                        found = symbol(
                            np.int64(buffer >> _u64(48)), 16, 2 + np.int64(ac_table), limits, offsets, symbols
                        )
                        if not is_ac(found):
                            return 0
                        run, size = found >> 9, (found >> 5) & 15
                        found = found & 31 | (run + 1 if size or run else 0) << 5 | size << 12
                    used, passed, size, value = found & 31, (found >> 5) & 127, (found >> 12) & 15, found >> 16
                    buffer <<= _u64(used)
                    have -= used
                    if passed == 0:
                        break
                    k += passed
                    if k > 63:
                        return 0
                    if size:
                        value = signed(np.int64(buffer >> _u64(64 - size)), size)
                        buffer <<= _u64(size)
                        have -= size
                    product = value * steps[component, _u64(k)]
                    odd |= (product + (1 << 13)) >> 14
                    work[ZIGZAG[_u64(k)]] = product
                place = blocks[block, 3] + (column - left) * blocks[block, 4] + (row - top) * blocks[block, 5]
                if k == 0:
                    fill(np.int64(work[0]), planes, place, blocks[block, 6])
                else:
                    odd |= np.int64(transform(work, turned, planes, place, blocks[block, 6]))
            if 8 * at - have > 8 * filled:
                return 0
            if row == bottom - 1 and column == right - 1:
                break
    return 0 if odd else 1
