"""`rookery prep --format ffcv`: what is stored, the same bytes every time, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_prep import beton
from data_prep.errors import UserError
from data_prep.manifest import Manifest, load_index
from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from data_prep.verify import verify
from launch.cli import _commands
from tests.data_prep.helpers import TEXT, decoded, digests, encoded, make_folder, options, pixels, read_plain
from tests.data_prep.helpers import image_of as image_of_tar

MODES: dict[str, dict[str, Any]] = {
    "jpg": {},
    "raw": {"write_mode": "raw"},
    "proportion": {"write_mode": "proportion", "compress_probability": 0.4},
    "smart": {"write_mode": "smart", "smart_threshold": 3 * 40 * 30},
}


def ffcv(**changes: Any) -> PrepOptions:
    return options(format="ffcv", **changes)


def stored(split: Path) -> dict[str, tuple[bytes, tuple[int, int] | None]]:
    """Key -> bytes of the image, and its (height, width) if they are pixels."""
    found = {}
    for shard in Manifest.load(split).shards:
        data = (split / shard.file).read_bytes()
        for number, row in enumerate(load_index(split, shard)):
            offset, at = int(row["offset"]), beton.ROWS_START + number * beton.ROW.itemsize
            shape = beton.raw_shape(data[at : at + beton.ROW.itemsize], offset)
            found[row["key"].decode()] = (data[offset : offset + int(row["size"])], shape)
    return found


@pytest.fixture
def mixed(source: Path) -> Path:
    """The three class folders and images of other kinds, sizes and troubles."""
    made: dict[str, bytes] = {
        "ant/bad.jpg": TEXT,
        "bee/cmyk.jpg": encoded(pixels(1), mode="CMYK"),
        "bee/palette.png": encoded(pixels(2), "PNG", "P"),
        "bee/alpha.png": encoded(pixels(3, channels=4), "PNG"),
        "cat/grey.jpg": encoded(pixels(4, channels=1)),
        "cat/large.jpg": encoded(pixels(5, 90, 50)),
        "cat/moving.gif": encoded(pixels(6), "GIF"),
        "cat/web.webp": encoded(pixels(7), "WEBP"),
    }
    for name, data in made.items():
        (source / name).write_bytes(data)
    return source


@pytest.mark.parametrize("mode", MODES)
def test_workers_change_no_byte(mixed: Path, tmp_path: Path, mode: str) -> None:
    for workers in (1, 3):
        manifest = prepare(mixed, tmp_path / str(workers), ffcv(**MODES[mode], workers=workers))
    assert digests(tmp_path / "1") == digests(tmp_path / "3")
    assert verify(tmp_path / "1") == []
    assert (manifest.format, manifest.num_samples, len(manifest.shards)) == ("ffcv", 22, 6)
    assert Manifest.load(tmp_path / "1" / "train") == manifest
    assert [shard.file for shard in manifest.shards] == [f"train-{n:06d}.beton" for n in range(6)]


def test_the_same_samples_as_in_tars(mixed: Path, tmp_path: Path) -> None:
    """Keys, labels, order, and what is wrong with the source; and the very bytes of a JPEG."""
    tars, betons = (prepare(mixed, tmp_path / o.format, o) for o in (options(), ffcv()))
    assert [(bad.source, bad.reason) for bad in tars.quarantine] == [(b.source, b.reason) for b in betons.quarantine]
    assert {bad.source: bad.action for bad in betons.quarantine} == {
        "ant/bad.jpg": "dropped", "bee/cmyk.jpg": "converted to RGB", "cat/moving.gif": "stored as JPEG"
    }  # fmt: skip
    for tar, shard in zip(tars.shards, betons.shards, strict=True):
        of_tar = load_index(tmp_path / "webdataset" / "train", tar)
        of_beton = load_index(tmp_path / "ffcv" / "train", shard)
        assert (of_tar["key"] == of_beton["key"]).all() and (of_tar["label"] == of_beton["label"]).all()
    found = stored(tmp_path / "ffcv" / "train")
    for sample in read_plain(tmp_path / "webdataset" / "train"):
        data, shape = found[sample["__key__"]]
        assert shape is None
        if "jpg" in sample:
            assert data == sample["jpg"]
        else:
            lossless = np.asarray(Image.open(io.BytesIO(image_of_tar(sample))).convert("RGB")).astype(int)
            assert np.abs(decoded(data) - lossless).mean() < 15  # palettes of few colours are hard for JPEG


def test_raw_pixels_are_those_of_the_image(mixed: Path, tmp_path: Path) -> None:
    prepare(mixed, tmp_path / "tars", options())
    prepare(mixed, tmp_path / "raw", ffcv(write_mode="raw"))
    found = stored(tmp_path / "raw" / "train")
    samples = read_plain(tmp_path / "tars" / "train")
    assert len(found) == len(samples) == 22
    for sample in samples:
        expected = np.asarray(Image.open(io.BytesIO(image_of_tar(sample))).convert("RGB"))
        data, shape = found[sample["__key__"]]
        assert shape == expected.shape[:2]
        if "cmyk" not in sample["__key__"]:  # which the tar holds as a JPEG of its converted pixels
            assert data == expected.tobytes()


def test_proportion_is_drawn_per_sample(tmp_path: Path) -> None:
    """More of them are JPEG at a higher probability, none is another one, and other shards change nothing."""
    source = make_folder(tmp_path / "source", per_class=60, size=12)
    jpegs = {}
    for name, changes in {
        "0": {"compress_probability": 0.0},
        "0.3": {"compress_probability": 0.3},
        "0.5": {},
        "0.5 otherwise": {"shard_samples": 7, "shuffle": False},
        "1": {"compress_probability": 1.0},
    }.items():
        prepare(source, tmp_path / name, ffcv(**{"write_mode": "proportion", "shard_samples": 90, **changes}))
        found = stored(tmp_path / name / "train")
        jpegs[name] = {key for key, (_, shape) in found.items() if shape is None}
    assert jpegs["0"] < jpegs["0.3"] < jpegs["0.5"] == jpegs["0.5 otherwise"] < jpegs["1"]
    assert 0.2 * 180 < len(jpegs["0.3"]) < 0.4 * 180 and 0.4 * 180 < len(jpegs["0.5"]) < 0.6 * 180


def test_smart_looks_at_the_size_in_the_shard(mixed: Path, tmp_path: Path) -> None:
    for resize, large in ((None, "jpg"), (25, "raw")):  # 45 x 25 pixels are few enough
        prepare(mixed, tmp_path / large, ffcv(**MODES["smart"], resize=resize))
        found = stored(tmp_path / large / "train")
        jpegs = {key[9:] for key, (_, shape) in found.items() if shape is None}
        assert jpegs == ({"large"} if large == "jpg" else set())


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"max_resolution": 30}, {(30, 22), (30, 16)}),
        ({"max_resolution": 60}, {(40, 30), (60, 33)}),
        ({"resize": 24}, {(32, 24), (43, 24)}),
        ({"resize": 24, "max_resolution": 40}, {(32, 24), (40, 22)}),
        ({"max_resolution": 1}, {(1, 1)}),
    ],
)
@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_sizes(mixed: Path, tmp_path: Path, mode: str, changes: dict[str, int], sizes: set[tuple[int, int]]) -> None:
    prepare(mixed, tmp_path / "out", ffcv(**MODES[mode], **changes))
    for data, shape in stored(tmp_path / "out" / "train").values():
        assert (Image.open(io.BytesIO(data)).size if shape is None else shape[::-1]) in sizes
        assert shape is None or len(data) == 3 * shape[0] * shape[1]


def test_quality(mixed: Path, tmp_path: Path) -> None:
    sizes = [
        sum(shard.bytes for shard in prepare(mixed, tmp_path / str(q), ffcv(resize=20, quality=q)).shards)
        for q in (40, 95)
    ]
    assert sizes[0] < sizes[1] - 22 * 100


def test_a_shard_of_bad_images_disappears(source: Path, tmp_path: Path) -> None:
    everything = prepare(source, tmp_path / "all", ffcv(shuffle=False))
    for path in list((source / "ant").iterdir())[:4]:
        path.write_bytes(b"\0" * path.stat().st_size)
    fewer = prepare(source, tmp_path / "fewer", ffcv(shuffle=False))
    assert (everything.num_samples, fewer.num_samples) == (15, 11)
    assert everything.shards[2:] == fewer.shards[-2:]
    assert verify(tmp_path / "fewer") == []


def test_one_format_replaces_the_other_when_asked(source: Path, tmp_path: Path) -> None:
    for old, new in ((options(), ffcv()), (ffcv(), options())):
        out = tmp_path / old.format
        prepare(source, out, old)
        with pytest.raises(UserError, match=f"format was {old.format}, is {new.format}"):
            prepare(source, out, new)
        assert verify(out) == []
        prepare(source, out, options(format=new.format, overwrite=True))
        prepare(source, tmp_path / f"new {new.format}", new)
        assert digests(out) == digests(tmp_path / f"new {new.format}")


def test_a_beton_of_somebody_else_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "imagenet.beton").write_bytes(TEXT)
    with pytest.raises(UserError, match=r"holds imagenet\.beton"):
        prepare(source, tmp_path / "out", ffcv())
    assert (tmp_path / "out" / "train" / "imagenet.beton").read_bytes() == TEXT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--format zip", "--format zip: no such format; there are webdataset and ffcv"),
        ("--format ffcv --write-mode png", "--write-mode png: no such mode; there are jpg, raw, proportion, smart"),
        ("--write-mode raw", "--write-mode is an option of --format ffcv"),
        ("--max-resolution 400", "--max-resolution is an option of --format ffcv"),
        ("--compress-probability 0.5", "--compress-probability is an option of --format ffcv"),
        ("--format ffcv --compress-probability 0.5", "--compress-probability is for --write-mode proportion"),
        ("--format ffcv --write-mode raw --smart-threshold 9", "--smart-threshold is for --write-mode smart"),
        (
            "--format ffcv --write-mode proportion --compress-probability 1.5",
            "--compress-probability is 1.5, it must lie between 0 and 1",
        ),
        ("--format ffcv --token-labels maps", "--token-labels: a .beton has no place for label maps"),
    ],
)
def test_mistakes_get_one_message(tmp_path: Path, arguments: str, said: str) -> None:
    result = CliRunner().invoke(_commands, ["prep", "digits", str(tmp_path / "out"), *arguments.split()])
    assert isinstance(result.exception, UserError) and str(result.exception).startswith(said)
    assert not (tmp_path / "out").exists()


def test_the_options_are_in_the_manifest(source: Path, tmp_path: Path) -> None:
    arguments = ["--format", "ffcv", "--max-resolution", "33", "--quality", "80", "--write-mode", "proportion"]
    result = CliRunner().invoke(_commands, ["prep", str(source), str(tmp_path / "out"), "--workers", "1", *arguments])
    assert result.exit_code == 0, result.output
    assert Manifest.load(tmp_path / "out" / "train").options == {
        "shard_samples": None, "shard_mb": 128, "shuffle_seed": 0, "resize": None, "quality": 80,
        "restart_markers": True, "max_resolution": 33, "write_mode": "proportion", "compress_probability": 0.5,
        "smart_threshold": None,
    }  # fmt: skip
