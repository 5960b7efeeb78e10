"""Encoded bytes to 8-bit arrays, by libjpeg-turbo where it can."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.manifest import is_absurd
from pipeline.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_MAGIC = b"\xff\xd8\xff"
_BASELINE, _OTHER_FRAMES, _SCAN = 0xC0, (0xC1, 0xC2, 0xC3), 0xDA


class Rows(NamedTuple):
    """The upper rows of a picture, or all of it.

    Attributes:
        pixels: (h, W, C) uint8.
        height: rows of the whole picture.
    """

    pixels: np.ndarray
    height: int


def decode_rows(data: bytes, in_chans: int, shape: tuple[int, int] | None, bottom: Callable[[int, int], int]) -> Rows:
    """As `decode_array`, but a baseline JPEG only as far down as needed: what lies below a crop is never parsed.

    The rows asked for are those of the whole picture, to the last bit.

    Args:
        bottom: (width, height) of the picture to how many of its rows are needed.

    Raises:
        UserError: the bytes are no image any more.
    """
    found = _frame(data) if in_chans == 3 and shape is None else None
    # Without its end mark it is cut short, which decoding part of it would not show.
    if found is None or b"\xff\xd9" not in data[-64:]:
        pixels = decode_array(data, in_chans, shape)
        return Rows(pixels, len(pixels))
    at, block = found
    height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
    # One more row of blocks, out of which chroma is interpolated.
    rows = (-(-bottom(width, height) // block) + 1) * block
    if rows >= height or is_absurd(width, height):
        pixels = decode_array(data, in_chans, shape)
        return Rows(pixels, len(pixels))
    import simplejpeg  # only loader processes decode

    shorter = b"".join((data[: at + 5], rows.to_bytes(2, "big"), data[at + 7 :]))
    try:
        return Rows(simplejpeg.decode_jpeg(shorter, "RGB", strict=False), height)  # strict: no data after the last row
    except ValueError:
        pixels = decode_array(data, in_chans, shape)
        return Rows(pixels, len(pixels))


def _frame(data: bytes) -> tuple[int, int] | None:
    """Where the frame header of a baseline JPEG with 1 or 3 components begins, and pixel rows of a row of blocks.

    Numbers of markers and fields: ITU-T T.81, annex B.
    """
    if data[:3] != _JPEG_MAGIC:
        return None
    at = 2
    while at + 20 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _BASELINE:
            components = data[at + 9]
            if components not in (1, 3):
                return None
            # One component has blocks of 8 x 8, whatever sampling it names.
            high = 1 if components == 1 else max(data[at + 11 + 3 * i] & 15 for i in range(components))
            return (at, 8 * high) if high in (1, 2, 4) else None
        if marker in _OTHER_FRAMES or marker == _SCAN:
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def decode_array(data: bytes, in_chans: int, shape: tuple[int, int] | None = None) -> np.ndarray:
    """The picture as (H, W, in_chans) uint8; an alpha channel is dropped.

    The values are those of Pillow, which uses the same library in a roundabout way; all but plain JPEG is left to it.

    Args:
        data: an image file, or the RGB pixels of an image of this `shape`, (height, width).

    Raises:
        UserError: the bytes are no image any more.
    """
    if in_chans == 3 and shape is not None and len(data) == 3 * shape[0] * shape[1]:
        return np.frombuffer(bytearray(data), np.uint8).reshape(*shape, 3)  # writable: torch and Numba want it
    if in_chans == 3 and shape is None and data[:3] == _JPEG_MAGIC:
        import simplejpeg  # only loader processes decode

        try:
            height, width, space, *_ = simplejpeg.decode_jpeg_header(data)
            # Those colours it makes RGB in its own way; absurd sizes are refused below.
            if space not in ("CMYK", "YCCK") and not is_absurd(width, height):
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # damage that Pillow describes better
    pixels = np.array(decode_image(data, in_chans, shape))
    return pixels.reshape(*pixels.shape[:2], in_chans)


def decode_image(data: bytes, in_chans: int, shape: tuple[int, int] | None = None) -> Image.Image:
    """The picture by Pillow, RGB or greyscale; arguments as for `decode_array`.

    Raises:
        UserError: the bytes are no image any more.
    """
    try:
        if shape is not None:
            image = Image.frombytes("RGB", shape[::-1], data)
            return image.convert("L") if in_chans == 1 else image
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if is_absurd(*image.size):
                raise ValueError(f"absurd size: {image.width} x {image.height} pixels")
            return image.convert("L" if in_chans == 1 else "RGB")
    except MemoryError:
        raise
    except Image.UnidentifiedImageError as error:  # its text holds an address
        raise UserError("can't be decoded (no JPEG, PNG or WebP)") from error
    except Exception as error:  # the decoders raise nearly every type on damaged bytes
        raise UserError(f"can't be decoded ({error or type(error).__name__})") from error
