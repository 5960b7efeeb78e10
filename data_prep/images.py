"""Is this image usable, and which bytes go into the shard?

Every image is decoded once, in full. A usable one keeps its original bytes unless restart markers are asked for, it is
resized, its pixels are of a kind that readers get wrong (CMYK, 16 bit), or its format is one that they don't read (GIF,
BMP, TIFF). Metadata is never applied: an EXIF orientation stays in kept bytes, where the ImageNet pipelines ignore it,
and is lost, unapplied, in re-encoded ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.manifest import MAX_BYTES, is_absurd
from data_prep.restarts import restart_interval, with_restarts

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
MAX_SCANNED = 2_000_000_000  # half a minute
READ_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # a closed list: some others start external programs
RAW = "raw"  # the extension of pixels that are not encoded at all
STORED_AS = {"jpg": "JPEG", "png": "PNG", RAW: "raw pixels"}
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


class UnusableImage(Exception):
    """The image can't be used; the message is the reason."""


@dataclass(frozen=True)
class Usable:
    """What goes into the shard.

    Attributes:
        data: the encoded image, or (height, width, 3) uint8 RGB pixels.
        extension: its true format, whatever the source called it; `RAW` for pixels.
        width, height: in pixels.
        repair: (what was wrong, what was done) where the image was not simply kept or resized.
    """

    data: bytes
    extension: str
    width: int
    height: int
    repair: tuple[str, str] | None = None


def make_usable(
    data: bytes,
    resize: int | None = None,
    quality: int = 90,
    max_resolution: int | None = None,
    store_raw: Callable[[int, int], bool] | None = None,
    restarts: bool = False,
) -> Usable:
    """Check one image; shrink it to short side `resize` if it is larger; mend what readers would get wrong.

    Resizing is bicubic with antialiasing (Pillow), the long side rounded down as torchvision does. JPEG and WebP become
    JPEG of this quality (4:2:0), everything else stays lossless as PNG.

    Args:
        max_resolution: shrink to this long side too.
        store_raw: (width, height) to whether it is stored as pixels, for a shard that holds JPEG and raw pixels and
            nothing else; None: for one that holds files of any format.
        restarts: give JPEGs that are kept restart markers, which changes no pixel.

    Raises:
        UnusableImage: zero bytes, not an image, truncated or damaged, or of an absurd size.
    """
    image = _decode(data)
    name, mode = image.format or "", image.mode
    size = _shrunk(image.size, resize, max_resolution)
    kept = EXTENSIONS.get(name) if mode in PLAIN_MODES and size == image.size else None
    if store_raw is None:
        extension = kept or ("jpg" if name in ("JPEG", "MPO", "WEBP") else "png")
    else:
        extension = RAW if store_raw(*size) else "jpg"
    if extension == kept:
        return Usable(with_restarts(data, image) if restarts and name == "JPEG" else data, extension, *size)
    repair = None
    if mode not in PLAIN_MODES:
        image = _eight_bit(image)
        repair = (f"{name} with {mode} pixels", f"converted to {'greyscale' if image.mode == 'L' else 'RGB'}")
    elif name not in EXTENSIONS:
        repair = (f"{name} image", f"stored as {STORED_AS[extension]}")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return Usable(_stored(image, extension, quality), extension, *size, repair)


def _shrunk(size: tuple[int, int], resize: int | None, max_resolution: int | None) -> tuple[int, int]:
    for limit, side_of in ((resize, min), (max_resolution, max)):
        side = side_of(size)
        if limit is not None and side > limit:
            width, height = (max(1, limit * length // side) for length in size)
            size = (width, height)
    return size


def absurd_bytes(size: int) -> str:
    """Why a file of more than `MAX_BYTES` is no image; sources that know the size need not read it."""
    return f"absurd size: {size} bytes, the limit is {MAX_BYTES}"


def encode_png(pixels: np.ndarray) -> bytes:
    """Lossless PNG of uint8 pixels, (H, W) greyscale or (H, W, 3) RGB."""
    return _encoded(Image.fromarray(np.ascontiguousarray(pixels)), "PNG")


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise UnusableImage("zero bytes")
    if len(data) > MAX_BYTES:
        raise UnusableImage(absurd_bytes(len(data)))
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=READ_FORMATS)
        width, height = image.size
        if is_absurd(width, height):
            raise UnusableImage(f"absurd size: {width} x {height} pixels")
        # Every scan of a progressive JPEG goes over all of its pixels.
        scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
        if scans * width * height > MAX_SCANNED:
            raise UnusableImage(f"absurd size: {width} x {height} pixels, {scans} scans")
        image.load()
    except Image.UnidentifiedImageError:
        raise UnusableImage(f"not an image ({', '.join(READ_FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise UnusableImage(f"absurd size: {error}") from error
    except (UnusableImage, MemoryError):
        raise
    except Exception as error:  # the decoders raise nearly every type on damaged bytes
        reason = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise UnusableImage(f"{reason}: {error or type(error).__name__}") from error
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """CMYK and other colour spaces to RGB, 16-bit greyscale to 8 bits (which a plain convert would clip)."""
    if image.mode.startswith("I"):
        values = np.asarray(image)  # unsigned 16 bits, or signed 32
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UnusableImage(f"{image.format} with {image.mode} pixels, which have no RGB form") from error


def _stored(image: Image.Image, extension: str, quality: int) -> bytes:
    if extension == RAW:
        return image.convert("RGB").tobytes()
    if extension == "jpg":
        interval = restart_interval(image.width, 16 if image.mode == "RGB" else 8)  # pixels of a unit of 4:2:0, of grey
        return _encoded(image, "JPEG", quality=quality, restart_marker_blocks=interval)
    return _encoded(image, "PNG")


def _encoded(image: Image.Image, name: str, **options: int) -> bytes:
    image.info.clear()  # Pillow would copy some metadata (profiles, comments) from the source
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()
