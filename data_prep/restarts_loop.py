"""The coded bits of a JPEG, written again with restart markers by a compiled loop."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit("int64(uint8[::1], int64, uint64)", cache=True, nogil=True)
def _put(out, size, value):
    """Write a byte of coded data, behind 255 a zero."""
    out[size] = value
    if value != 0xFF:
        return size + 1
    out[size + 1] = 0
    return size + 2


@numba.njit("int64(uint8[::1], int64, uint64, int64)", cache=True, nogil=True)
def _flush(out, size, kept, full):
    """Write the last bits and fill their byte with ones."""
    if full == 0:
        return size
    rest = np.uint64(8 - full)
    return _put(out, size, (kept << rest | ((np.uint64(1) << rest) - np.uint64(1))) & np.uint64(0xFF))


_SIGNATURE = (
    "UniTuple(int64, 2)(Array(uint8, 1, 'C', readonly=True), int64, int64, int64, int64[:, ::1], uint16[:, ::1], "
    "uint32[:, ::1], uint8[::1])"
)


@numba.njit(_SIGNATURE, cache=True, nogil=True)
def rewrite(data, scan, units, interval, blocks, lookup, codes, out):
    """Decode the Huffman codes of a scan and write them again, with a marker after every so many units.

    Args:
        data: a JPEG.
        scan: where its coded bytes begin.
        units: coded units of the scan.
        interval: units between markers.
        blocks: (n, 3), of each block of a unit: component, DC table, AC table.
        lookup: (4, 65536), DC tables then AC tables: of the next 16 bits the length of the code, times 256, and symbol.
        codes: (2, 12), of the DC tables to write with: the code of a symbol and, above 16 bits, its length.
        out: takes the coded bytes; long enough.

    Returns:
        Bytes written, and where in `data` its own coded bytes end; (0, 0): damaged, or a difference has no code.
    """
    at, held, bits = scan, np.uint64(0), 0  # the reader: the lowest `bits` bits of `held` are next
    size, kept, full = 0, np.uint64(0), 0  # the writer
    before = np.zeros(3, np.int64)  # DC values before this block, as read
    written = np.zeros(3, np.int64)  # and as a decoder of what is written has them
    padded = 0  # bits that were read behind the end
    for unit in range(units):
        if unit and unit % interval == 0:
            size, full = _flush(out, size, kept, full), 0
            out[size], out[size + 1] = 0xFF, 0xD0 + (unit // interval - 1) % 8
            size += 2
            written[:] = 0
        for block in range(len(blocks)):
            component, dc, ac = blocks[block, 0], blocks[block, 1], 2 + blocks[block, 2]
            k = 0
            while k < 64:
                while bits <= 32:  # a code has up to 16 bits, a value 15
                    if at + 1 >= len(data):
                        return 0, 0
                    value = np.uint64(data[at])
                    if value != 0xFF:
                        at += 1
                    elif data[at + 1] == 0:
                        at += 2
                    else:
                        value = np.uint64(0)
                        padded += 8
                    held = held << np.uint64(8) | value
                    bits += 8
                found = lookup[dc if k == 0 else ac, (held >> np.uint64(bits - 16)) & np.uint64(0xFFFF)]
                length, symbol = int(found >> 8), int(found & 0xFF)
                if length == 0:
                    return 0, 0
                more = symbol & 15
                bits -= length + more
                if bits < padded:  # so that what is written has its bounds too
                    return 0, 0
                if k == 0:
                    low = int((held >> np.uint64(bits)) & ((np.uint64(1) << np.uint64(more)) - np.uint64(1)))
                    before[component] += low if more == 0 or low >> (more - 1) else low - (1 << more) + 1
                    change = before[component] - written[component]
                    written[component] = before[component]
                    more = 0
                    while abs(change) >> more:
                        more += 1
                    if more > 11:
                        return 0, 0
                    length = int(codes[dc, more] >> 16)
                    coded = np.uint64(codes[dc, more] & 0xFFFF) << np.uint64(more)
                    coded |= np.uint64(change if change >= 0 else change + (1 << more) - 1)
                    k = 1
                else:
                    coded = (held >> np.uint64(bits)) & ((np.uint64(1) << np.uint64(length + more)) - np.uint64(1))
                    k = 64 if symbol == 0 else k + (symbol >> 4) + 1
                kept = kept << np.uint64(length + more) | coded
                full += length + more
                while full >= 8:
                    full -= 8
                    size = _put(out, size, (kept >> np.uint64(full)) & np.uint64(0xFF))
            if k > 64:
                return 0, 0
    size = _flush(out, size, kept, full)
    # What is left must be the padding of the last byte, and then a marker.
    left = bits - padded
    if not 0 <= left < 8 or at + 1 >= len(data) or data[at] != 0xFF or data[at + 1] == 0:
        return 0, 0
    return size, at
