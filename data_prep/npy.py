"""Reading `.npy` files without evaluating their header.

`numpy.load` reads the header as a Python literal. Two threads of CPython 3.11 that parse one at the same time may both
get a SystemError (python/cpython issue 106905), and an intact file would pass for a damaged one.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import numpy as np

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(r"\{'descr': (.+), 'fortran_order': False, 'shape': \(([\d, ]*)\), \} *\n")
_START = len(_MAGIC) + 2
_LONGEST = 10_000  # characters of a header, NumPy's own limit


def map_npy(path: Path) -> np.ndarray:
    """Memory-map a file, read-only.

    Raises:
        OSError: it can't be read.
        ValueError: it is no array in C order that `numpy.save` has written, or it is cut.
    """
    with open(path, "rb") as file:
        dtype, shape, start = _header(file.read(_START + _LONGEST), os.fstat(file.fileno()).st_size)
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape)


def parse_npy(data: bytes) -> np.ndarray:
    """The array of a file's bytes, a copy.

    Raises:
        ValueError: as of `map_npy`.
    """
    dtype, shape, start = _header(data, len(data))
    return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape).copy()


def _header(data: bytes, size: int) -> tuple[np.dtype, tuple[int, ...], int]:
    """Type and shape of an array, and the byte at which it starts; `size` of the file in bytes."""
    if not data.startswith(_MAGIC):
        raise ValueError("not an .npy file of version 1.0")
    end = _START + int.from_bytes(data[len(_MAGIC) : _START], "little")
    header = _HEADER.fullmatch(data[_START:end].decode("latin-1"))
    if header is None:
        raise ValueError("its header is none that numpy.save writes")
    dtype = _dtype(header[1])
    shape = tuple(int(side) for side in header[2].split(",") if side.strip())
    if end + math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"{size} bytes, too few for shape {shape}")
    return dtype, shape, end


def _dtype(described: str) -> np.dtype:
    """Of `'<f2'`, or `[('offset', '<u8'), ...]`."""
    try:
        fields = json.loads(described.translate(str.maketrans("'()", '"[]')))
        dtype = np.dtype(fields if isinstance(fields, str) else [tuple(field) for field in fields])
    except Exception as error:  # NumPy raises nearly every type on a damaged one
        raise ValueError(f"its header names no type of NumPy ({error})") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return dtype
