"""`rookery bench loader`: every contender gives the batches it should, figures are put together rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from data_prep import beton
from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from launch import cli
from launch.bench_loader.contender import Settings
from launch.bench_loader.ours import OURS, split
from launch.bench_loader.peers import PEERS
from launch.bench_loader.report import advice, rows
from launch.bench_loader.rounds import contenders
from launch.bench_loader.scene import Scene, set_up
from pipeline.data.shards import ShardSet


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 JPEGs of different sizes in two classes."""
    source, draw = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for label, photo in enumerate(load_sample_images().images):
        (source / str(label)).mkdir()
        for i in range(96):
            height, width = draw.integers(40, 120, 2)
            top, left = draw.integers(0, 300, 2)
            Image.fromarray(photo[top : top + height, left : left + width]).save(source / str(label) / f"{i}.jpg")
    return source


def prepared(pictures: Path, out: Path, **options: Any) -> Path:
    prepare(pictures, out, PrepOptions(workers=1, **({"shard_samples": 64} | options)), "train")
    return out / "train"


@pytest.fixture(scope="module")
def photos(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(pictures, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def scene(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return set_up(photos, tmp_path_factory.mktemp("scene"), 100, workers=1)


def contents(split: Path | None) -> list[tuple[str, bytes, int, Any]]:
    assert split is not None
    shards = ShardSet(split)
    return [(sample.key, sample.data, sample.label, sample.shape) for sample in shards.read(range(len(shards)))]


@pytest.mark.parametrize(
    ("options", "none"),
    [
        ({}, set()),
        ({"format": "ffcv"}, set()),
        ({"format": "ffcv", "shard_samples": 200}, set()),
        ({"format": "ffcv", "write_mode": "raw"}, {"tars", "files"}),
        ({"format": "ffcv", "write_mode": "proportion", "compress_probability": 0.5}, {"tars", "files"}),
    ],
    ids=["tars", "betons", "one beton", "pixels", "some pixels"],
)
def test_the_first_shards_in_all_forms(options: dict[str, Any], none: set[str], pictures: Path, tmp_path: Path) -> None:
    split = prepared(pictures, tmp_path / "shards", **options)
    (tmp_path / "scene").mkdir()
    scene = set_up(split, tmp_path / "scene", 100, workers=2)
    assert {name for name in ("tars", "betons", "files", "beton") if getattr(scene, name) is None} == none
    assert scene.own == (scene.betons if options else scene.tars)
    wanted = contents(split)[: 200 if "shard_samples" in options else 128]
    assert scene.images == len(wanted) and contents(scene.betons) == wanted
    assert len(list(scene.own.glob("*.idx.npy"))) == (1 if "shard_samples" in options else 2)
    assert scene.beton is not None
    fields = np.fromfile(scene.beton, beton.HEADER, 1)[0]
    assert fields["num_samples"] == scene.images
    if scene.files is not None:
        assert contents(scene.tars) == wanted
        stored = [(scene.files / f"{label:05d}" / f"{key}.jpg").read_bytes() for key, _, label, _ in wanted]
        assert stored == [data for _, data, _, _ in wanted]
        assert sum(path.is_file() for path in scene.files.rglob("*")) == scene.images
        assert scene.tars is not None and len(list(scene.tars.glob("*.tar"))) == 2
    here, left_out = contenders("crop", scene)
    first = "rookery, FFCV shards" if options else "rookery"
    assert here[0].name == first and len({contender.name for contender in here}) == len(here)
    assert all("the shards hold pixels, not files alone" in line for line in left_out if "no package" not in line)
    assert sum("no package" not in line for line in left_out) == (5 if none else 0)


def test_those_that_read_tars_have_one_for_each_worker(pictures: Path, tmp_path: Path) -> None:
    """Made of a single FFCV shard; with fewer they would fail, or leave images out."""
    split = prepared(pictures, tmp_path / "shards", format="ffcv", shard_samples=200)
    (tmp_path / "scene").mkdir()
    scene = set_up(split, tmp_path / "scene", 192, workers=2)
    for contender in [contender for contender in PEERS if contender.reads == "tars"]:
        settings = Settings(scene, "crop", side=32, batch=16, workers=2, prefetch=1, warmup=1)
        batches = list(contender.epochs(settings)())
        assert len(batches) == 192 // 16, contender.name


def test_without_others_nothing_is_made_for_them(photos: Path, pictures: Path, tmp_path: Path) -> None:
    pixels = prepared(pictures, tmp_path / "shards", format="ffcv", write_mode="raw")
    of_photos = ["rookery", "rookery, antialiased", "rookery, FFCV shards"]
    of_pixels = ["rookery, FFCV shards", "rookery, antialiased"]
    for own, names in ((photos, of_photos), (pixels, of_pixels)):
        folder = tmp_path / names[0]
        folder.mkdir()
        scene = set_up(own, folder, 100, workers=1, peers=False)
        assert scene.files is None and {path.name for path in folder.iterdir()} <= {"own", "betons"}
        here, left_out = contenders("crop", scene, peers=False)
        assert [contender.name for contender in here] == names
        assert left_out == ([] if own == photos else ["rookery (the shards hold pixels, not files alone)"])


def test_what_ffcv_can_not_hold_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "source" / "0").mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / "source" / "0" / f"{i}.png")
    split = prepared(tmp_path / "source", tmp_path / "shards")
    (tmp_path / "scene").mkdir()
    scene = set_up(split, tmp_path / "scene", 8, workers=1)
    assert scene.betons is scene.beton is None and scene.files is not None and scene.tars == scene.own
    left_out = contenders("nest", scene)[1]
    assert left_out == ["rookery, FFCV shards (FFCV holds JPEG files and pixels, not what these shards hold)"]


@pytest.mark.parametrize(
    ("contender", "recipe"),
    [(c, r) for c in [*OURS, *PEERS] for r in c.recipes if c.package != "ffcv"],
    ids=lambda value: getattr(value, "name", value),
)
def test_contenders_give_batches(contender: object, recipe: str, scene: Scene) -> None:
    settings = Settings(scene, recipe, side=32, batch=16, workers=1, prefetch=1, warmup=1)
    images = scene.images
    batches = list(contender.epochs(settings)())  # type: ignore[attr-defined]
    pictures = [batch[0] if isinstance(batch, tuple | list) else batch for batch in batches]
    assert len(pictures) == images // 16
    for batch in pictures:
        assert batch.shape == (16, 3, 32, 32)
        assert batch.dtype == (torch.float32 if recipe == "nest" else torch.uint8)
        assert batch.float().std() > 0.1


def test_rounds_are_compared_turn_by_turn() -> None:
    def turns(*rates: float) -> list[dict[str, float]]:
        return [{"images": 64, "rate": rate, "cpu": 1 / rate} for rate in rates]

    first, other, broken = rows({"a": turns(100, 200, 50), "b": turns(50, 50, 50), "c": "ValueError: no"}, workers=2)
    assert first["images_per_second"] == {"median": 100, "min": 50, "max": 200}
    assert first["images_per_second_per_worker"] == 50 and first["cpu_milliseconds_per_image"]["median"] == 10
    assert other["first_is_faster_by"] == {"median": 2, "min": 1, "max": 4}
    assert broken == {"name": "c", "failed": "ValueError: no"}


@pytest.mark.parametrize(
    ("largest", "says"),
    [
        ("read", "local storage"),
        ("decode", "--resize 400"),
        ("crop", "antialias"),
        ("augment", "data.workers"),
        ("collate", "data.lanes"),
    ],
)
def test_advice_names_the_bottleneck(largest: str, says: str) -> None:
    spent = {"read": 0.1, "decode": 0.1, "crop": 0.1, "augment": 0.1, "finish": 9.0, "collate": 0.1} | {largest: 0.5}
    report = {"split_ms": spent, "target_images_per_second": 2000, "stored_kilobytes": 110.0}
    cores, knob = advice(report)
    assert says in knob and "56%" in knob
    assert "1.8 cores" in cores and "data.workers=2" in cores


def test_where_the_time_goes(scene: Scene) -> None:
    settings = Settings(scene, "nest", side=32, batch=16, workers=1, prefetch=1, warmup=1)
    spent = split(settings, batches=2)
    assert set(spent) == {"read", "decode", "crop", "augment", "finish", "collate"}
    assert all(0 <= milliseconds < 50 for milliseconds in spent.values()) and spent["decode"] > 0


def test_the_command(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    options = "--no-peers --side 32 --batch 8 --workers 1 --samples 190 --repeats 2 --target 3000 --out"
    result = CliRunner().invoke(cli._commands, ["bench", "loader", str(photos), *options.split(), str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    own, smooth, other = report["loaders"]
    assert (own["name"], smooth["name"]) == ("rookery", "rookery, antialiased")
    assert other["name"] == "rookery, FFCV shards" and other["images_per_second"]["min"] > 0
    assert own["first_is_faster_by"]["median"] == 1 and smooth["images_per_second"]["min"] > 0
    waits = report["wait_share"]
    assert 0 <= waits["lower_quartile"] <= waits["median"] <= waits["upper_quartile"] < 1
    assert report["samples"] == 192
    assert report["added_share"]["median"] <= waits["median"]
    assert "images/s need" in result.output and "rookery, antialiased" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "deit"], "there is crop and nest"),
        (["--batch", "64", "--workers", "2", "--no-peers"], "set a smaller --batch or more --samples"),
        (["--out", "/no/such/folder/x.json"], "choose another --out"),
    ],
)
def test_mistakes(options: list[str], message: str, photos: Path) -> None:
    result = CliRunner().invoke(cli._commands, ["bench", "loader", str(photos), *options])
    assert message in str(result.exception)


def test_shards_in_a_store_are_refused() -> None:
    result = CliRunner().invoke(cli._commands, ["bench", "loader", "s3://bucket/train"])
    assert "s3://bucket/train: other loaders read files of this machine" in str(result.exception)
