"""Which bytes go into the shard, for every kind of image that ImageNet and its cousins hold."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.images import UnusableImage, encode_png, make_usable
from tests.data_prep.helpers import TEXT, decoded, encoded, pixels

# Pillow's remarks on odd files; the builder silences them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")

RGB = pixels(1)
GREY = pixels(2, channels=1)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


KEPT = {
    "rgb": (encoded(RGB), "jpg"),
    "progressive": (encoded(RGB, progressive=True), "jpg"),
    "grey": (encoded(GREY), "jpg"),
    "png": (encoded(RGB, "PNG"), "png"),
    "palette": (encoded(RGB, "PNG", "P"), "png"),
    "alpha": (encoded(RGB, "PNG", "RGBA"), "png"),
    "one-bit": (encoded(GREY, "PNG", "1"), "png"),
    "webp": (encoded(RGB, "WEBP"), "webp"),
    "rotated": (encoded(RGB, exif=exif(6)), "jpg"),
    "corrupt-exif": (encoded(RGB, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage"), "jpg"),
    "empty-exif": (encoded(RGB, exif=b"Exif\0\0"), "jpg"),
    "tail": (encoded(RGB) + b"trailing bytes", "jpg"),
    "1x1": (encoded(pixels(1, 1, 1)), "jpg"),
}

REFUSED = {
    "zero": (b"", "zero bytes"),
    "text": (TEXT, "not an image"),
    "magic-only": (b"\xff\xd8\xff", "not an image"),
    "cut": (encoded(RGB)[:-200], "truncated"),
    "cut-progressive": (encoded(RGB, progressive=True)[:-200], "truncated"),
    "cut-png": (encoded(RGB, "PNG")[:-100], "truncated|damaged"),
    "flipped-png": (encoded(RGB, "PNG")[:60] + bytes(40) + encoded(RGB, "PNG")[100:], "damaged"),
    "wide": (png_header(20_001, 10), "absurd size: 20001 x 10"),
    "bomb": (png_header(15_000, 15_000), "absurd size"),
    "large": (png_header(12_000, 12_000), "absurd size: 12000 x 12000"),
    "bytes": (encoded(RGB) + bytes(64 * 2**20), "absurd size: .* bytes"),
}


@pytest.mark.parametrize("case", KEPT)
def test_usable_images_keep_their_bytes(case: str) -> None:
    data, extension = KEPT[case]
    usable = make_usable(data)
    assert (usable.data, usable.extension, usable.repair) == (data, extension, None)


@pytest.mark.parametrize("case", REFUSED)
def test_bad_images_are_refused_with_their_reason(case: str) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(UnusableImage, match=reason):
        make_usable(data)


def test_every_cut_of_a_jpeg_is_noticed_or_harmless() -> None:
    """Whatever is cut off: either refused, or every pixel is as in the whole image."""
    whole = encoded(RGB, quality=95)
    refused = 0
    for length in range(0, len(whole), 7):
        try:
            usable = make_usable(whole[:length])
        except UnusableImage:
            refused += 1
        else:
            np.testing.assert_array_equal(decoded(usable.data), decoded(whole))
    assert refused > len(whole) // 7 - 5


def test_cmyk_becomes_rgb_with_a_record() -> None:
    usable = make_usable(encoded(RGB, mode="CMYK", quality=95), quality=95)
    image = Image.open(io.BytesIO(usable.data))
    assert (usable.extension, image.format, image.mode) == ("jpg", "JPEG", "RGB")
    assert usable.repair == ("JPEG with CMYK pixels", "converted to RGB")
    assert np.abs(np.asarray(image).astype(int) - RGB).mean() < 4  # the same picture, not its negative


def test_sixteen_bit_grey_keeps_its_range() -> None:
    deep = np.linspace(0, 65535, 256 * 4, dtype=np.uint16).reshape(4, 256)
    usable = make_usable(encoded(deep, "PNG"))
    assert usable.extension == "png"
    assert usable.repair is not None
    np.testing.assert_array_equal(decoded(usable.data), deep >> 8)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
def test_formats_that_readers_lack_are_stored_lossless(kind: str) -> None:
    data = encoded(RGB, kind)
    usable = make_usable(data)
    assert (usable.extension, usable.repair) == ("png", (f"{kind} image", "stored as PNG"))
    np.testing.assert_array_equal(decoded(usable.data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [((100, 60), 30, (50, 30)), ((60, 101), 30, (30, 50)), ((60, 30), 30, (60, 30)), ((20, 20), 30, (20, 20))],
)
def test_resize_shrinks_the_short_side_only(size: tuple[int, int], resize: int, expected: tuple[int, int]) -> None:
    data = encoded(pixels(5, *size))
    usable = make_usable(data, resize)
    assert Image.open(io.BytesIO(usable.data)).size == expected
    assert (usable.data == data) == (size == expected)
    assert usable.repair is None


def test_resize_is_pillows_antialiased_bicubic() -> None:
    data = encoded(pixels(7, 200, 120), "PNG")
    expected = Image.open(io.BytesIO(data)).resize((50, 30), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(decoded(make_usable(data, 30).data), np.asarray(expected))


@pytest.mark.parametrize(("mode", "kept"), [("L", "L"), ("P", "RGB"), ("RGBA", "RGB"), ("1", "L")])
def test_resized_images_are_grey_or_rgb(mode: str, kept: str) -> None:
    assert Image.open(io.BytesIO(make_usable(encoded(RGB, "PNG", mode), 10).data)).mode == kept


def test_quality_changes_the_size_and_metadata_is_gone() -> None:
    data = encoded(pixels(3, 200, 200), exif=exif(6), comment=b"a comment", icc_profile=b"p" * 200)
    low, high = make_usable(data, 100, 50).data, make_usable(data, 100, 95).data
    assert len(low) < len(high) < len(data)
    image = Image.open(io.BytesIO(high))
    assert not image.getexif()
    assert not {"comment", "icc_profile"} & set(image.info)
    assert image.size == (100, 100)


def test_png_of_pixels_is_lossless() -> None:
    for array in (RGB, GREY):
        np.testing.assert_array_equal(decoded(encode_png(array)), array)
