"""Tables that tell of the next bits of a JPEG what a loop over its Huffman codes wants to know.

Codes: ITU-T T.81, annexes C and F.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from data_prep.jpeg_coding import HuffmanTable, huffman_tables

# Tables are asked by the next so many bits, in which most codes end.
BITS = 12
_TABLE = "int64, int64[:, ::1], int64[:, ::1], uint8[:, ::1]"
_u64 = np.uint64


class Tables(NamedTuple):
    """The Huffman tables of a scan. What is asked by the next 12 bits has 0 where no code ends within these.

    Attributes:
        dc: (2, 4096) int32, by table and bits: length of the code + 32 x category of the difference.
        ac: (2, 4096) int32: length of the code, with the bits of the value if these are seen in full, + 32 x how many
            coefficients are passed, 0 for the end of the block, + 4096 x bits of a value that is not seen in full
            + 65536 x the value.
        pairs: (2, 4096) int64: of one or two AC coefficients that are seen in full, or of the end of a
            block: bits + 32 x how many coefficients the first passes, 0 for the end + 4096 x how many more the
            second does + 2**19 if the block ends + 2**32 x the first value + 2**48 x the second one, or the first
            one again.
        skip: (2, 4096) int32: of as many AC coefficients as are seen: bits of all codes and values + 32 x how many
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
    dc, ac, skip = (np.zeros((2, 1 << BITS), np.int32) for _ in range(3))
    limits, offsets = (np.zeros((4, 17), np.int64) for _ in range(2))
    pairs = np.zeros((2, 1 << BITS), np.int64)
    made = Tables(dc, ac, pairs, skip, limits, offsets, np.zeros((4, 256), np.uint8))
    for segment in segments:
        tables = huffman_tables(segment)
        if tables is None:
            return None
        for table in tables:
            _read_table(made, table)
    return made


def _read_table(made: Tables, table: HuffmanTable) -> None:
    at = 2 * table.kind + table.number
    made.symbols[at] = np.frombuffer(table.symbols.ljust(256, b"\0")[:256], np.uint8)
    code = place = 0
    for length, count in enumerate(table.counts, 1):
        made.offsets[at, length] = place - code
        place, code = place + count, code + count
        made.limits[at, length] = code
        code <<= 1
    codes = at, made.limits, made.offsets, made.symbols
    if table.kind == 0:
        _fill_dc(*codes, made.dc[table.number])
    else:
        _fill_ac(*codes, made.ac[table.number])
        _fill_pairs(made.ac[table.number], made.pairs[table.number])
        _fill_skip(made.ac[table.number], made.skip[table.number])


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


@numba.njit(f"void({_TABLE}, int32[::1])", cache=True, nogil=True, boundscheck=False)
def _fill_dc(number, limits, offsets, symbols, dc):
    for bits in range(1 << BITS):
        dc[bits] = symbol(bits, BITS, number, limits, offsets, symbols)


@numba.njit(f"void({_TABLE}, int32[::1])", cache=True, nogil=True, boundscheck=False)
def _fill_ac(number, limits, offsets, symbols, ac):
    for bits in range(1 << BITS):
        found = symbol(bits, BITS, number, limits, offsets, symbols)
        length, run, size = found & 31, found >> 9, (found >> 5) & 15
        if not is_ac(found):
            ac[bits] = 0
        elif size == 0:
            ac[bits] = length | (run + 1 if run else 0) << 5
        elif length + size <= BITS:
            value = signed((bits >> (BITS - length - size)) & ((1 << size) - 1), size)
            ac[bits] = (length + size) | (run + 1) << 5 | value << 16
        else:
            ac[bits] = length | (run + 1) << 5 | size << 12


@numba.njit("void(int32[::1], int64[::1])", cache=True, nogil=True, boundscheck=False)
def _fill_pairs(ac, pairs):
    for bits in range(1 << BITS):
        first = np.int64(ac[bits])
        used, passed, value = first & 31, (first >> 5) & 127, first >> 16
        if first == 0 or used > BITS or (first >> 12) & 15:
            pairs[bits] = 0
            continue
        more, end, other = 0, 0 if passed else 1, value
        if passed:
            second = np.int64(ac[(bits << used) & ((1 << BITS) - 1)])
            # Behind the bits that are known there are zeros, which must not count.
            if second != 0 and used + (second & 31) <= BITS and (second >> 12) & 15 == 0:
                used += second & 31
                more = (second >> 5) & 127
                if more:
                    other = second >> 16
                else:
                    end = 1
        low = used | passed << 5 | more << 12 | end << 19
        pairs[bits] = low | (value & 0xFFFF) << 32 | other << 48


@numba.njit("void(int32[::1], int32[::1])", cache=True, nogil=True, boundscheck=False)
def _fill_skip(ac, skip):
    for bits in range(1 << BITS):
        used, passed, end = 0, 0, 0
        while used < BITS:
            found = np.int64(ac[(bits << used) & ((1 << BITS) - 1)])
            length, run, size = found & 31, (found >> 5) & 127, (found >> 12) & 15
            if found == 0 or used + (length if size else min(length, BITS)) > BITS:
                break
            if passed + run > 63:
                break
            used += length + size
            passed += run
            if run == 0:
                end = 1
                break
        skip[bits] = end << 12 | passed << 5 | used
