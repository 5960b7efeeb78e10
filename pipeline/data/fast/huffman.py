"""Tables that tell of the next bits of a JPEG what a loop over its Huffman codes wants to know.

Most pictures of ImageNet have codes of their own, so the tables are made anew for nearly every one of them.

Codes: ITU-T T.81, annexes C and F.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

# Tables are asked by the next so many bits, in which most codes end.
BITS = 12
_SIZE = 1 << BITS
_u64 = np.uint64


class Tables(NamedTuple):
    """The Huffman tables of a scan. What is asked by the next 12 bits has 0 where no code ends within these.

    Attributes:
        dc: (2, 4096) uint16, by table and bits: length of the code + 32 x category of the difference.
        ac: (2, 4096) int32: length of the code, with the bits of the value if these are seen in full, + 32 x how many
            coefficients are passed, 0 for the end of the block, + 4096 x bits of a value that is not seen in full
            + 65536 x the value.
        pairs: (2, 4096) int32: of one or two AC coefficients that are seen in full and have up to 8 bits, of a block
            with them, or of the end of a block: bits + 32 x how many coefficients the first passes, 0 for the end
            + 1024 x how many more the second does + 2**15 if the block ends + 2**16 x the first value + 2**24 x the
            second one, or the first one again.
        skip: (2, 4096) uint16: of as many AC coefficients as are seen: bits of all codes and values + 32 x how many
            coefficients are passed + 4096 if the block ends there.
        limits: (4, 17) int64, DC tables then AC tables, of each length of codes: one more than the last code.
        offsets: (4, 17) int64: what is to be added to a code to get the place of its symbol.
        symbols: (4, 256) uint8.
    """

    dc: np.ndarray
    ac: np.ndarray
    pairs: np.ndarray
    skip: np.ndarray
    limits: np.ndarray
    offsets: np.ndarray
    symbols: np.ndarray


def read_tables(segments: tuple[bytes, ...]) -> Tables | None:
    """The tables of a picture; None if they can't be those of a baseline JPEG.

    Args:
        segments: that define them, in their order; a later one replaces those of the same numbers.
    """
    short, long = np.zeros((2, 2, _SIZE), np.uint16), np.zeros((2, 2, _SIZE), np.int32)
    limits = np.zeros((2, 4, 17), np.int64)
    made = Tables(short[0], long[0], long[1], short[1], limits[0], limits[1], np.zeros((4, 256), np.uint8))
    for segment in segments:
        if not _read(np.frombuffer(segment, np.uint8), *made):
            return None
    return made


_TABLE = "int64, int64[:, ::1], int64[:, ::1], uint8[:, ::1]"


@numba.njit(f"int64(int64, int64, {_TABLE})", cache=True, nogil=True, boundscheck=False)
def symbol(bits, width, table, limits, offsets, symbols):
    """What the next `width` bits begin with: length of the code + 32 x symbol; 0 if they hold no whole code."""
    for length in range(1, min(width, 16) + 1):
        code = bits >> (width - length)
        if code < limits[_u64(table), _u64(length)]:
            place = offsets[_u64(table), _u64(length)] + code
            return length | np.int64(symbols[_u64(table), _u64(place & 255)]) << 5
    return 0


@numba.njit("boolean(int64)", cache=True, nogil=True)
def is_ac(found):
    """Whether what `symbol` found is one of the coefficients of a baseline JPEG, whose values have up to 10 bits."""
    run, size = found >> 9, (found >> 5) & 15
    return found != 0 and (size <= 10 if size else run == 0 or run == 15)


@numba.njit("int64(int64, int64)", cache=True, nogil=True)
def signed(bits, size):
    """The value that is coded in so many bits: without a leading one it is negative."""
    return bits - (1 << size) + 1 if size and bits >> (size - 1) == 0 else bits


@numba.njit(f"void({_TABLE}, uint16[::1])", cache=True, nogil=True, boundscheck=False)
def _fill_dc(table, limits, offsets, symbols, dc):
    dc[:] = 0
    at = 0
    for length in range(1, BITS + 1):
        many = 1 << (BITS - length)
        for code in range(at >> (BITS - length), limits[table, length]):
            dc[at : at + many] = length | np.int64(symbols[table, offsets[table, length] + code]) << 5
            at += many


@numba.njit(f"void({_TABLE}, int32[::1])", cache=True, nogil=True, boundscheck=False)
def _fill_ac(table, limits, offsets, symbols, ac):
    ac[:] = 0
    at = 0
    for length in range(1, BITS + 1):
        rest = BITS - length
        for code in range(at >> rest, limits[table, length]):
            found = length | np.int64(symbols[table, offsets[table, length] + code]) << 5
            run, size = found >> 9, (found >> 5) & 15
            if size == 0 and is_ac(found):
                ac[at : at + (1 << rest)] = length | (run + 1 if run else 0) << 5
            elif is_ac(found) and size > rest:
                ac[at : at + (1 << rest)] = length | (run + 1) << 5 | size << 12
            elif is_ac(found):
                many = 1 << (rest - size)
                for value in range(1 << size):
                    entry = (length + size) | (run + 1) << 5 | signed(value, size) << 16
                    for i in range(at + value * many, at + (value + 1) * many):
                        ac[_u64(i)] = entry
            at += 1 << rest


@numba.njit("void(int32[::1], int32[::1])", cache=True, nogil=True, boundscheck=False)
def _fill_pairs(ac, pairs):
    for bits in range(_SIZE):
        first = np.int64(ac[_u64(bits)])
        used, passed, value = first & 31, (first >> 5) & 127, first >> 16
        if first == 0 or (first >> 12) & 15 or not -128 <= value < 128:
            pairs[_u64(bits)] = 0
            continue
        more, end, other = 0, 0 if passed else 1, value
        if passed:
            second = np.int64(ac[_u64((bits << used) & (_SIZE - 1))])
            # Behind the bits that are known there are zeros, which must not count.
            if second != 0 and used + (second & 31) <= BITS and (second >> 12) & 15 == 0 and -128 <= second >> 16 < 128:
                used += second & 31
                more = (second >> 5) & 127
                if more:
                    other = second >> 16
                else:
                    end = 1
        pairs[_u64(bits)] = used | passed << 5 | more << 10 | end << 15 | (value & 0xFF) << 16 | other << 24


@numba.njit("void(int32[::1], int32[::1], uint16[::1])", cache=True, nogil=True, boundscheck=False)
def _fill_skip(ac, pairs, skip):
    for bits in range(_SIZE):
        two = np.int64(pairs[_u64(bits)])
        used, passed, end = two & 31, ((two >> 5) & 31) + ((two >> 10) & 31), (two >> 15) & 1
        while used < BITS and not end:
            found = np.int64(ac[_u64((bits << used) & (_SIZE - 1))])
            length, run, size = found & 31, (found >> 5) & 127, (found >> 12) & 15
            if found == 0 or used + length > BITS or passed + run > 63:
                break
            used += length + size
            passed += run
            end = 0 if run else 1
        skip[_u64(bits)] = end << 12 | passed << 5 | used


@numba.njit(
    "boolean(Array(uint8, 1, 'C', readonly=True), uint16[:, ::1], int32[:, ::1], int32[:, ::1], uint16[:, ::1], "
    "int64[:, ::1], int64[:, ::1], uint8[:, ::1])",
    cache=True,
    nogil=True,
    boundscheck=False,
)
def _read(segment, dc, ac, pairs, skip, limits, offsets, symbols):
    """Read the tables of a segment: each is a byte, 16 numbers of codes by length, and the symbols (annex B)."""
    at = 0
    while at + 17 <= len(segment):
        kind, number = np.int64(segment[at]) >> 4, np.int64(segment[at]) & 15
        if kind > 1 or number > 1:
            return False
        table, first = 2 * kind + number, at + 17
        code, place = 0, 0
        for length in range(1, 17):
            count = np.int64(segment[at + length])
            if code + count > 1 << length or place + count > 256 or first + place + count > len(segment):
                return False
            offsets[table, length] = place - code
            limits[table, length] = code + count
            for i in range(place, place + count):
                symbols[table, i] = segment[first + i]
                if kind == 0 and segment[first + i] > 15:
                    return False
            place, code = place + count, (code + count) << 1
        if kind == 0:
            _fill_dc(number, limits, offsets, symbols, dc[number])
        else:
            _fill_ac(table, limits, offsets, symbols, ac[number])
            _fill_pairs(ac[number], pairs[number])
            _fill_skip(ac[number], pairs[number], skip[number])
        at = first + place
    return at == len(segment)
