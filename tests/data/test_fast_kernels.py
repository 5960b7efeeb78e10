"""Compiled operations give the numbers that Pillow and the plain path give."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from data_prep.images import make_usable
from pipeline.data import fast
from pipeline.data.augment import color as plain_color
from pipeline.data.augment.crop import Box
from pipeline.data.augment.randaugment import POLICIES, draw_ops, fill_color
from pipeline.data.augment.settings import ColorJitterConfig, RandAugmentConfig
from pipeline.data.fast import color, jpeg, resize
from pipeline.data.fast.decode import decode_array, decode_image, decode_part
from pipeline.data.fast.jpeg import decode_box
from pipeline.data.fast.randaugment import apply_op
from pipeline.errors import UserError

SIDE = 96


def test_all_that_is_compiled_is_known() -> None:
    folder = Path(fast.__path__[0])
    compiled = {f"{fast.__name__}.{file.stem}" for file in folder.glob("*.py") if "njit" in file.read_text()}
    code = f"import importlib, sys; [*map(importlib.import_module, {fast.COMPILED})]; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert len(compiled) > 6 and compiled <= set(modules.split())


def pictures(side: int = SIDE) -> dict[str, np.ndarray]:
    """Photographs and the pictures on which operations go wrong first."""
    draw = np.random.default_rng(0)
    flower, china = (np.ascontiguousarray(photo[:side, 200 : 200 + side]) for photo in load_sample_images().images)
    return {
        "flower": flower,
        "china": china,
        "one colour": np.full((side, side, 3), 77, np.uint8),
        "two values": ((draw.random((side, side, 3)) < 0.3) * 255).astype(np.uint8),
        "noise": draw.integers(0, 256, (side, side, 3), np.uint8),
        "black": np.zeros((side, side, 3), np.uint8),
        "grey": np.ascontiguousarray(flower[:, :, :1]),
    }


def image_of(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture if picture.shape[2] == 3 else picture[:, :, 0])


@pytest.mark.parametrize(
    ("policy", "name"), [(policy, name) for policy, operations in POLICIES.items() for name in operations]
)
def test_every_operation_equals_pillow(policy: str, name: str) -> None:
    operations = list(POLICIES[policy])
    which = (operations.index(name) + 0.5) / len(operations)
    draw = np.random.default_rng(1)
    for label, picture in pictures().items():
        fill = fill_color(policy, (0.485, 0.456, 0.406)[: picture.shape[2]])
        for magnitude in (0.0, 5.0, 9.0, 10.0):
            for _ in range(2):
                config = RandAugmentConfig(policy=policy, layers=1, prob=1.0, magnitude=magnitude, std=1.0)  # type: ignore[arg-type]
                [op] = draw_ops(config, SIDE, "random", [which, 0.0, *draw.random(4).tolist()])
                expected = np.asarray(op.apply(image_of(picture), fill)).reshape(picture.shape)
                got, _ = apply_op(picture.copy(), np.empty_like(picture), op, np.atleast_1d(np.array(fill, np.uint8)))
                assert np.array_equal(got, expected), (label, magnitude, op.arg, op.resample)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("box", [(0, 0, 96, 96), (10, 3, 30, 90), (50, 60, 7, 5), (95, 0, 1, 96), (0, 20, 96, 1)])
def test_resize_equals_pillow(box: tuple[int, int, int, int], mirror: bool) -> None:
    top, left, height, width = box
    for label, picture in pictures().items():
        memory = np.full((65, 64, picture.shape[2]), 7, np.uint8)
        out = memory[:64]
        resize.resize_point(picture, top, left, height, width, mirror, out)
        assert (memory[64] == 7).all(), "written behind the picture"
        part = image_of(np.ascontiguousarray(picture[top : top + height, left : left + width]))
        whole = part.transform((64, 64), Image.Transform.EXTENT, (0, 0, width, height), Image.Resampling.BILINEAR)
        if mirror:
            whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        difference = np.abs(out.astype(int) - np.asarray(whole).reshape(out.shape))
        # Single precision: what Pillow cuts to a whole number from just above may lie just below.
        assert difference.max() <= 1 and (difference > 0).mean() < 2e-3, label


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_color_jitter_equals_the_plain_path_rounded(strength: float) -> None:
    config, draw = ColorJitterConfig(strength=strength), np.random.default_rng(2)
    seen = set()
    for label, picture in pictures().items():
        planes = np.empty((picture.shape[2], SIDE * SIDE), np.float32)
        for _ in range(25):
            jitter = plain_color.draw_color_jitter(config, draw.random(7).tolist())
            seen.add((jitter.gray, *(name for name, _ in jitter.adjustments)))
            pixels = torch.from_numpy(picture).permute(2, 0, 1).float().div(255)
            expected = plain_color.apply_color_jitter(pixels, jitter).permute(1, 2, 0).numpy() * 255
            got = picture.copy()
            color.apply_color_jitter(got, jitter, planes)
            assert np.abs(got - expected).max() < 0.501, (label, jitter)
    assert len(seen) > 20  # most of the 24 orders


def encoded(image: Image.Image, kind: str, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PHOTO = Image.fromarray(load_sample_images().images[1])
ENCODED = {
    "baseline": encoded(PHOTO, "JPEG", quality=90),
    "progressive": encoded(PHOTO, "JPEG", quality=60, progressive=True),
    "4:4:4": encoded(PHOTO, "JPEG", subsampling=0),
    "grey": encoded(PHOTO.convert("L"), "JPEG"),
    "cmyk": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "odd sides": encoded(PHOTO.crop((0, 0, 333, 211)), "JPEG"),
    "png": encoded(PHOTO, "PNG"),
    "png with alpha": encoded(PHOTO.convert("RGBA"), "PNG"),
    "webp": encoded(PHOTO, "WEBP"),
}


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", ENCODED)
def test_decoded_equals_pillow(name: str, in_chans: int) -> None:
    got = decode_array(ENCODED[name], in_chans)
    expected = np.asarray(decode_image(ENCODED[name], in_chans)).reshape(got.shape)
    assert got.shape[2] == in_chans and got.flags.c_contiguous
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"GIF89a", ENCODED["baseline"][:5000], ENCODED["png"][:5000]])
def test_damaged_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(UserError, match="can't be decoded"):
        decode_array(data, 3)


SMALL = PHOTO.crop((0, 0, 400, 300))  # 25 units of 16 pixels in a row
ROTATED = SMALL.transpose(Image.Transpose.TRANSPOSE)  # 19 units, a prime number
PARTS = {
    "4:2:0": ENCODED["baseline"],
    "4:2:2": encoded(PHOTO, "JPEG", subsampling=1),
    "4:4:4": ENCODED["4:4:4"],
    "grey": ENCODED["grey"],
    "4:2:0, odd sides": ENCODED["odd sides"],
    "4:2:2, odd sides": encoded(PHOTO.crop((0, 0, 333, 211)), "JPEG", subsampling=1),
    "optimized": encoded(PHOTO, "JPEG", optimize=True),
    "the best quality": encoded(SMALL, "JPEG", quality=100, subsampling=0),
    "the worst quality": encoded(SMALL, "JPEG", quality=1),
    "flat": encoded(Image.new("RGB", (97, 61), (200, 30, 90)), "JPEG"),
    "black beside white": encoded(
        Image.fromarray(np.kron(np.eye(40, dtype=np.uint8), np.full((8, 8), 255, np.uint8))), "JPEG"
    ),
    "noise": encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)), "JPEG", quality=98
    ),
    "6 x 40": encoded(PHOTO.crop((300, 200, 306, 240)), "JPEG"),
    "40 x 1": encoded(PHOTO.crop((300, 200, 340, 201)), "JPEG"),
    "a marker each row": encoded(PHOTO, "JPEG", restart_marker_rows=1),
    "a marker each unit": encoded(SMALL, "JPEG", restart_marker_blocks=1),
    "a marker each 5 units": encoded(SMALL, "JPEG", restart_marker_blocks=5),
    "a marker each unit, 19 in a row": encoded(ROTATED, "JPEG", restart_marker_blocks=1),
    "a marker each 4 units, 19 in a row": encoded(ROTATED, "JPEG", restart_marker_blocks=4),
    "a marker each 2 rows": encoded(PHOTO, "JPEG", restart_marker_rows=2),
    "markers, 4:4:4": encoded(SMALL, "JPEG", subsampling=0, restart_marker_blocks=2),
    "markers, 4:2:2": encoded(SMALL, "JPEG", subsampling=1, restart_marker_blocks=1),
    "markers, grey": encoded(SMALL.convert("L"), "JPEG", restart_marker_blocks=2),
    "markers, odd sides": encoded(SMALL.crop((0, 0, 333, 277)), "JPEG", restart_marker_blocks=3),
    "markers, optimized": encoded(SMALL, "JPEG", quality=98, optimize=True, restart_marker_blocks=5),
    "prepared": make_usable(encoded(PHOTO, "JPEG"), resize=300).data,
    "prepared, grey": make_usable(encoded(PHOTO.convert("L"), "JPEG"), resize=300).data,
}
# Those of which no part is decoded alone.
WHOLE = {
    "4:4:0": simplejpeg.encode_jpeg(np.array(SMALL), colorsubsampling="440"),
    "4:1:1": simplejpeg.encode_jpeg(np.array(SMALL), colorsubsampling="411"),
    "RGB": encoded(SMALL, "JPEG", keep_rgb=True),
    "3 x 40": encoded(PHOTO.crop((300, 200, 303, 240)), "JPEG"),
    "progressive": ENCODED["progressive"],
    "cmyk": ENCODED["cmyk"],
    "png": ENCODED["png"],
}


@pytest.mark.parametrize("name", PARTS | WHOLE)
def test_a_part_is_that_of_the_whole_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "_DECODED", 0)  # also where that takes longer
    monkeypatch.setattr(jpeg, "_PASSED", 0)
    data = (PARTS | WHOLE)[name]
    whole = decode_array(data, 3)
    height, width = whole.shape[:2]
    draw = np.random.default_rng(0)
    boxes = [Box(0, 0, height, width), Box(0, 0, 1, 1), Box(height - 1, width - 1, 1, 1)]
    boxes += [Box(15, 15, 18, 2)] if height > 32 and width > 16 else []
    for _ in range(60):
        h, w = draw.integers(1, height + 1), draw.integers(1, width + 1)
        boxes.append(Box(*map(int, (draw.integers(0, height - h + 1), draw.integers(0, width - w + 1), h, w))))
    for box in boxes:
        part = decode_part(data, 3, None, lambda *size, box=box: box if size == (width, height) else None)
        assert (part.width, part.height) == (width, height)
        top, left = box.top - part.top, box.left - part.left
        assert top >= 0 and left >= 0
        got = part.pixels[top : top + box.height, left : left + box.width]
        assert np.array_equal(got, whole[box.top : box.top + box.height, box.left : box.left + box.width]), box
    middle = Box(height // 3, width // 3, height // 3 + 1, width // 3 + 1)
    part = decode_part(data, 3, None, lambda *size: middle)
    assert part.pixels.shape[:2] == ((height, width) if name in WHOLE else (middle.height, middle.width))


@pytest.mark.parametrize("name", ["4:2:0", "4:4:4", "markers, grey", "prepared"])
def test_when_nearly_all_is_wanted_all_is_decoded(name: str) -> None:
    width, height = Image.open(io.BytesIO(PARTS[name])).size
    assert decode_box(PARTS[name], lambda *size: Box(1, 1, height - 2, width - 2)) is None
    found = decode_box(PARTS[name], lambda *size: Box(1, 1, height // 2, width // 2))
    assert found is not None and found[0].shape == (height // 2, width // 2, 3)


def test_numbers_beyond_those_of_pictures_are_left_to_the_library() -> None:
    """Between the passes it keeps 16 bits, here there are 32: where that matters the whole picture is decoded."""
    draw = np.random.default_rng(0)
    left = 0
    for name in ("the best quality", "black beside white", "noise"):
        data = bytearray(PARTS[name])
        for _ in range(60):
            at = data.index(b"\xff\xdb") + 5
            data[at : at + 64] = draw.integers(1, draw.choice([3, 20, 256]), 64, np.uint8).tobytes()
            try:
                whole = decode_array(bytes(data), 3)
            except UserError:
                continue
            box = Box(3, 5, 40, 33)
            part = decode_part(bytes(data), 3, None, lambda *size, box=box: box)
            left += part.pixels.shape == whole.shape
            pixels = part.pixels[box.top - part.top :, box.left - part.left :][: box.height, : box.width]
            assert np.array_equal(pixels, whole[3:43, 5:38])
    assert 10 < left < 170


@pytest.mark.parametrize("damage", ["gone", "doubled", "renumbered", "noise"])
def test_markers_out_of_order_are_no_help(damage: str) -> None:
    """The file is decoded as a whole then, and is what the decoder makes of it."""
    data = bytearray(PARTS["a marker each unit"])
    at = data.index(b"\xff\xd3")
    if damage == "noise":
        data[at - 40 : at] = bytes(range(40))
    else:
        data[at : at + 2] = {"gone": b"", "doubled": b"\xff\xd3\xff\xd3", "renumbered": b"\xff\xd5"}[damage]
    part = decode_part(bytes(data), 3, None, lambda *size: Box(40, 40, 30, 30))
    whole = decode_array(bytes(data), 3)
    if damage != "noise":
        assert np.array_equal(part.pixels, whole)
    assert np.array_equal(part.pixels[40 - part.top :, 40 - part.left :][:30, :30], whole[40:70, 40:70])


@pytest.mark.parametrize("name", ["4:2:0", "a marker each unit", "a marker each row", "markers, grey"])
def test_damage_is_an_error_or_a_picture(name: str) -> None:
    """Half of it in the header, whose lengths and sizes may then say anything."""
    data = PARTS[name]
    draw = np.random.default_rng(1)
    header = data.index(b"\xff\xda") + 14
    refused = 0
    for i in range(400):
        damaged = bytearray(data)
        for at in draw.integers(2, header if i % 2 else len(data), 1 + i % 3):
            damaged[at] = draw.choice([0, 0xFF, draw.integers(256)])
        try:
            part = decode_part(
                bytes(damaged), 3, None, lambda width, height: Box(0, 0, min(height, 40), min(width, 40))
            )
        except UserError:
            refused += 1
        else:
            assert part.pixels.ndim == 3 and part.pixels.size
    assert refused > 5


@pytest.mark.parametrize("size", [b"\xff\xff", b"\x7f\xff"])
def test_a_scan_that_begins_behind_the_end_is_decoded_as_a_whole(size: bytes) -> None:
    data = bytearray(PARTS["a marker each unit"])
    at = data.index(b"\xff\xda")
    data[at + 2 : at + 4] = size
    with pytest.raises(UserError, match="can't be decoded"):
        decode_part(bytes(data), 3, None, lambda *size: Box(40, 40, 30, 30))


@pytest.mark.parametrize("kept", [3000, 20_000])
def test_a_jpeg_cut_short_is_an_error_however_little_is_needed(kept: int) -> None:
    with pytest.raises(UserError, match="can't be decoded"):
        decode_part(ENCODED["baseline"][:kept], 3, None, lambda *size: Box(0, 0, 8, 8))
