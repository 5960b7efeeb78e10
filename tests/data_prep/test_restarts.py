"""Restart markers that are added to a JPEG: no pixel changes, and a loader can cut it."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.images import make_usable
from data_prep.manifest import Manifest
from data_prep.restarts import restart_interval, with_restarts
from pipeline.data.augment.crop import Box
from pipeline.data.fast.decode import decode_array, decode_part
from pipeline.data.shards import ShardSet
from tests.data_prep.helpers import decoded, encoded


def photo(width: int, height: int) -> np.ndarray:
    """Smooth shapes and some noise, in which all sizes of difference occur."""
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 17 + y / 31), np.cos(y / 11), np.sign(np.sin(x * y / 2000))], -1)
    return (128 + 100 * waves + noise).clip(0, 255).astype(np.uint8)


PHOTO = photo(500, 375)
TAKEN = {
    "4:2:0": encoded(PHOTO, quality=92),
    "4:2:2": encoded(PHOTO, subsampling=1),
    "4:4:4": encoded(PHOTO, subsampling=0, quality=97),
    "grey": encoded(PHOTO, mode="L"),
    "its own tables": encoded(PHOTO, optimize=True, quality=60),
    "flat, its own tables": encoded(np.full((480, 640, 3), (200, 30, 90), np.uint8), optimize=True),
    "black beside white": encoded(np.kron(np.eye(40, dtype=np.uint8), np.full((8, 8), 255, np.uint8))),
    "the best quality": encoded(PHOTO, quality=100, subsampling=0),
    "the worst quality": encoded(PHOTO, quality=1),
    "odd sides": encoded(photo(333, 277)),
    "narrow": encoded(photo(5, 200)),
    "one pixel": encoded(photo(1, 1)),
    "with a thumbnail": encoded(PHOTO, exif=b"Exif\0\0" + encoded(photo(60, 40))),
}
LEFT = {
    "progressive": encoded(PHOTO, progressive=True),
    "CMYK": encoded(PHOTO, mode="CMYK"),
    "has markers": encoded(PHOTO, restart_marker_blocks=4),
    "PNG": encoded(photo(64, 64), "PNG"),
    "cut short": encoded(PHOTO)[:-3000],
    "ends in the headers": encoded(PHOTO)[:300],
    "nothing": b"",
}


@pytest.mark.parametrize("kind", TAKEN)
def test_the_pixels_stay_and_a_part_can_be_cut_out(kind: str) -> None:
    data = TAKEN[kind]
    made = with_restarts(data)
    assert b"\xff\xdd\x00\x04" in made and len(made) < 1.05 * len(data) + 3000
    assert np.array_equal(decoded(made), decoded(data))
    before, after = (Image.open(io.BytesIO(d)) for d in (data, made))
    assert before.getexif() == after.getexif() and before.quantization == after.quantization  # type: ignore[attr-defined]

    whole = decode_array(data, 3)
    height, width = whole.shape[:2]
    box = Box(height // 2, width // 2, height // 4 + 1, width // 4 + 1)
    part = decode_part(made, 3, None, lambda w, h: box)
    top, left = box.top - part.top, box.left - part.left
    assert np.array_equal(
        part.pixels[top : top + box.height, left : left + box.width],
        whole[box.top : box.top + box.height, box.left : box.left + box.width],
    )
    if min(width, height) > 250:  # of the picture little more than that
        assert part.pixels.shape[0] <= box.height + 2 * 16 and part.pixels.shape[1] <= box.width + 2 * 64


@pytest.mark.parametrize("kind", LEFT)
def test_others_are_left_as_they_are(kind: str) -> None:
    assert with_restarts(LEFT[kind]) is LEFT[kind]


def test_damage_changes_no_pixel_either() -> None:
    draw = random.Random(0)
    taken = 0
    for data in (encoded(photo(120, 90)), encoded(photo(64, 64), subsampling=0, optimize=True)):
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(draw.randrange(1, 4)):
                damaged[draw.randrange(2, len(damaged))] = draw.choice([0, 0xFF, draw.randrange(256)])
            try:
                expected = decoded(bytes(damaged))
            except Exception:
                continue  # refused before
            made = with_restarts(bytes(damaged))
            assert np.array_equal(decoded(made), expected)
            taken += made != damaged
    assert taken > 20


def test_markers_are_close_and_divide_a_row() -> None:
    for width in range(1, 700):
        for block in (8, 16, 32):
            interval = restart_interval(width, block)
            assert -(-width // block) % interval == 0 and interval * block <= 64


def test_prep(tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    pictures = {"0.jpg": TAKEN["4:2:0"], "1.jpg": LEFT["progressive"], "2.png": LEFT["PNG"]}
    for name, data in pictures.items():
        (tmp_path / "photos" / "a" / name).write_bytes(data)
    command = [sys.executable, "-c", "from launch.cli import app; app()"]
    arguments = ["prep", "photos", "shards", "--split", "train", "--no-shuffle", "--restart-markers"]
    subprocess.run([*command, *arguments], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([*command, "verify", "shards"], cwd=tmp_path, check=True, capture_output=True)

    shards = tmp_path / "shards" / "train"
    assert Manifest.load(shards).options["restart_markers"] is True
    stored = [sample.data for sample in ShardSet(shards).read(range(3))]
    assert stored == [with_restarts(pictures["0.jpg"]), pictures["1.jpg"], pictures["2.png"]]
    assert stored[0] != pictures["0.jpg"] == make_usable(pictures["0.jpg"]).data
    again = subprocess.run([*command, *arguments[:-1]], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "restart_markers" in again.stderr.replace("\n", " ")

    # Small enough to be kept among shrunk ones, which have markers.
    subprocess.run([*command, *arguments[:-1], "--resize", "4000", "--overwrite"], cwd=tmp_path, check=True)
    assert [sample.data for sample in ShardSet(shards).read(range(3))] == stored
