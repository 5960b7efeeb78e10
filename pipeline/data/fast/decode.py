"""Encoded bytes to 8-bit arrays, by libjpeg-turbo where it can."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_MAGIC = b"\xff\xd8\xff"


def decode_array(data: bytes, in_chans: int) -> np.ndarray:
    """The picture as (H, W, in_chans) uint8; an alpha channel is dropped.

    The values are those of Pillow, which uses the same library in a roundabout way; all but plain JPEG is left to it.

    Raises:
        UserError: the bytes are no image any more.
    """
    if in_chans == 3 and data[:3] == _JPEG_MAGIC:
        import simplejpeg  # only loader processes decode

        try:
            if simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):  # these it makes RGB in its own way
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # damage that Pillow describes better
    pixels = np.array(decode_image(data, in_chans))
    return pixels.reshape(*pixels.shape[:2], in_chans)


def decode_image(data: bytes, in_chans: int) -> Image.Image:
    """The picture by Pillow, RGB or greyscale.

    Raises:
        UserError: the bytes are no image any more.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.convert("L" if in_chans == 1 else "RGB")
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise nearly every type on damaged bytes
        raise UserError(f"can't be decoded ({error}); check the shards with `rookery verify`") from error
