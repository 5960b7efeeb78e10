"""Encoded bytes to 8-bit arrays, by libjpeg-turbo where it can."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_MAGIC = b"\xff\xd8\xff"


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
            if simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):  # these it makes RGB in its own way
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
            return image.convert("L" if in_chans == 1 else "RGB")
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise nearly every type on damaged bytes
        raise UserError(f"can't be decoded ({error}); check the shards with `rookery verify`") from error
