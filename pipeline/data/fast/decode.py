"""Encoded bytes to 8-bit arrays, by libjpeg-turbo where it can."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.manifest import is_absurd
from pipeline.data.augment.crop import Box
from pipeline.data.fast.jpeg import MAGIC, decode_box
from pipeline.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")


class Part(NamedTuple):
    """A part of a picture, or all of it.

    Attributes:
        pixels: (h, w, C) uint8.
        top, left: where they begin in the picture.
        width, height: of the whole picture.
    """

    pixels: np.ndarray
    top: int
    left: int
    width: int
    height: int

    @classmethod
    def whole(cls, pixels: np.ndarray) -> Part:
        return cls(pixels, 0, 0, pixels.shape[1], pixels.shape[0])


def decode_part(data: bytes, in_chans: int, shape: tuple[int, int] | None, wanted: Callable[[int, int], Box]) -> Part:
    """As `decode_array`, but of a JPEG only the wanted part, where it can be told apart (see `decode_box`).

    The pixels are those of the whole picture, to the last bit. Damage outside of the part may not show.

    Args:
        wanted: (width, height) of the picture to the part that is needed.

    Raises:
        UserError: the bytes are no image any more.
    """
    found = decode_box(data, wanted) if in_chans == 3 and shape is None else None
    if found is not None:
        pixels, box, width, height = found
        return Part(pixels, box.top, box.left, width, height)
    return Part.whole(decode_array(data, in_chans, shape))


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
    if in_chans == 3 and shape is None and data[:3] == MAGIC:
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
