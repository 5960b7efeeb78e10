"""Pictures that are none, or not what they say. All are made when they are called for: some are large."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from tests.data_prep.helpers import encoded, pixels
from tests.fuzzing import damaged, generator

Make = Callable[[], bytes]

KINDS: dict[str, Make] = {
    "jpeg": lambda: encoded(pixels(7, 64, 48)),
    "progressive jpeg": lambda: encoded(pixels(7, 64, 48), progressive=True),
    "cmyk jpeg": lambda: encoded(pixels(7, 64, 48), mode="CMYK"),
    "png": lambda: encoded(pixels(7, 64, 48), "PNG"),
    "palette png": lambda: encoded(pixels(7, 64, 48), "PNG", mode="P"),
    "16-bit png": lambda: encoded(pixels(7, 64, 48)[..., 0].astype(np.uint16) * 257, "PNG"),
    "webp": lambda: encoded(pixels(7, 64, 48), "WEBP"),
    "gif": lambda: encoded(pixels(7, 64, 48), "GIF"),
    "bmp": lambda: encoded(pixels(7, 64, 48), "BMP"),
    "tiff": lambda: encoded(pixels(7, 64, 48), "TIFF"),
    "deflated tiff": lambda: encoded(pixels(7, 64, 48), "TIFF", compression="tiff_deflate"),
}


def _damage(kind: str, how: str) -> bytes:
    return damaged(KINDS[kind](), how.split()[0], generator(f"{kind} {how}"))


DAMAGED: dict[str, Make] = {
    f"{kind} {how}": partial(_damage, kind, how)
    for kind in KINDS
    for how in ("cut", "flipped", "flipped again", "zeroed", "spliced")
}


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    """A grey PNG that unpacks to this, whatever size it says it has."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")


def _png_with(more: bytes) -> bytes:
    """A PNG with further chunks before its pixels."""
    whole = encoded(np.zeros((40, 40), np.uint8), "PNG")
    return whole[:33] + more + whole[33:]


def _png_of_wrong_sum() -> bytes:
    whole = KINDS["png"]()
    return whole[:29] + bytes([whole[29] ^ 1]) + whole[30:]


def _jpeg_of(width: int, height: int) -> bytes:
    """A picture with another size in its header."""
    whole = KINDS["jpeg"]()
    place = whole.index(b"\xff\xc0") + 5
    return whole[:place] + struct.pack(">HH", height, width) + whole[place + 4 :]


def _jpeg_with_comments(number: int) -> bytes:
    whole = KINDS["jpeg"]()
    return whole[:2] + (b"\xff\xfe\xff\xff" + bytes(65_533)) * number + whole[2:]


def _jpeg_of_scans(number: int) -> bytes:
    """9 million pixels, and the last scan again and again."""
    whole = encoded(np.zeros((3000, 3000), np.uint8), progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * number + whole[-2:]


def _gif_of_frames(number: int) -> bytes:
    buffer, frames = io.BytesIO(), [Image.fromarray(np.full((8, 8), i % 256, np.uint8)) for i in range(number)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _bmp_of(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI IiiHHIIiiII", 90, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def _tiff_of(*tags: tuple[int, int, int]) -> bytes:
    """Tags as (number, count, value)."""
    entries = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in tags)
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(tags)) + entries + bytes(4)


_GIF_OF_65535 = b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02;"
_WEBP_OF_16383 = b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0\xfe\x3f\0\xfe\x3f\0" + bytes(10)

# What can't become a sample, whoever decodes it.
REFUSED: dict[str, Make] = {
    "empty": lambda: b"",
    "one byte": lambda: b"\xff",
    "jpeg magic alone": lambda: KINDS["jpeg"]()[:3],
    "png magic alone": lambda: KINDS["png"]()[:8],
    "noise": lambda: generator("noise").randbytes(5000),
    "zeros": lambda: bytes(5000),
    "text": lambda: b"not an image\n" * 50,
    "page of an error": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "executable": lambda: b"\x7fELF" + generator("elf").randbytes(500),
    "zip": lambda: b"PK\x03\x04" + generator("zip").randbytes(500),
    "packed picture": lambda: b"\x1f\x8b\x08" + zlib.compress(KINDS["jpeg"]()),
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>',
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n",
    "pdf": lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "portable pixmap": lambda: b"P6 2 2 255\n" + bytes(12),
    "photoshop": lambda: b"8BPS\x00\x01" + bytes(100),
    "avif": lambda: b"\x00\x00\x00\x1cftypavif" + bytes(100),
    "jpeg without its begin": lambda: KINDS["jpeg"]()[2:],
    "png of 2^31 pixels a side": lambda: _png(2**31 - 1, 2**31 - 1),
    "png of 60,000 pixels a side": lambda: _png(60_000, 60_000, bytes(10**6)),
    "png of no width": lambda: _png(0, 10, bytes(10)),
    "png that unpacks to too little": lambda: _png(500, 500, bytes(1000)),
    "png with a wrong checksum": _png_of_wrong_sum,
    "line of 20,000 pixels": lambda: encoded(np.zeros((1, 20_000), np.uint8), "PNG"),
    "tower of 15,000 pixels": lambda: encoded(np.zeros((15_000, 100), np.uint8), "PNG"),
    "jpeg of 65,500 pixels a side": lambda: _jpeg_of(65_500, 65_500),
    "jpeg of no height": lambda: _jpeg_of(64, 0),
    "gif of 65,535 pixels a side": lambda: _GIF_OF_65535,
    "bmp of 2^31 pixels a side": lambda: _bmp_of(2**31 - 1, 2**31 - 1),
    "webp of 16,383 pixels a side": lambda: _WEBP_OF_16383,
    "tiff that leads to itself": lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0" + bytes(20),
    "tiff of 2^32 strips": lambda: _tiff_of((256, 1, 9000), (257, 1, 9000), (273, 2**32 - 1, 8)),
    "progressive jpeg of 3,000 scans": lambda: _jpeg_of_scans(3000),
}

# Small pictures that carry or unpack to something large; they may be kept.
ODD: dict[str, Make] = {
    "99 million pixels": lambda: encoded(np.zeros((9_900, 10_000), np.uint8), "PNG"),
    "png that unpacks to 100 MB": lambda: _png(20, 20, bytes(10**8)),
    "png with a text of 100 MB": lambda: _png_with(_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8)))),
    "png with a profile of 100 MB": lambda: _png_with(_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(10**8)))),
    "png of 50,000 chunks": lambda: _png_with(_chunk(b"eXtr", b"") * 50_000),
    "gif of 2,000 frames": lambda: _gif_of_frames(2000),
    "jpeg with 60 MB of comments": lambda: _jpeg_with_comments(900),
    "jpeg, and 5 MB behind it": lambda: KINDS["jpeg"]() + bytes(5 * 10**6),
    "one pixel": lambda: encoded(np.zeros((1, 1), np.uint8), "PNG"),
}
