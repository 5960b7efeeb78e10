"""`rookery bench loader`: every contender gives the batches it should, figures are put together rightly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from launch import cli
from launch.bench_loader.contender import Settings
from launch.bench_loader.ours import OURS, split
from launch.bench_loader.peers import PEERS
from launch.bench_loader.report import advice, rows
from launch.bench_loader.scene import set_up


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 192 JPEGs of different sizes in two classes."""
    source, draw = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for label, photo in enumerate(load_sample_images().images):
        (source / str(label)).mkdir()
        for i in range(96):
            height, width = draw.integers(40, 120, 2)
            top, left = draw.integers(0, 300, 2)
            Image.fromarray(photo[top : top + height, left : left + width]).save(source / str(label) / f"{i}.jpg")
    out = tmp_path_factory.mktemp("shards")
    prepare(source, out, PrepOptions(workers=1, shard_samples=64), "train")
    return out / "train"


@pytest.fixture(scope="module")
def scene(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    shards, files, _, images = set_up(photos, tmp_path_factory.mktemp("scene"), 100)
    return shards, files, images


def test_the_first_shards_in_all_forms(photos: Path, scene: tuple[Path, Path, int]) -> None:
    shards, files, images = scene
    assert images == 128 and len(list(shards.glob("*.tar"))) == 2
    assert sum(path.is_file() for path in files.rglob("*")) == 128
    assert {path.name for path in files.iterdir()} == {"00000", "00001"}


@pytest.mark.parametrize(
    ("contender", "recipe"),
    [(c, r) for c in [*OURS, *PEERS] for r in c.recipes if c.package != "ffcv"],
    ids=lambda value: getattr(value, "name", value),
)
def test_contenders_give_batches(contender: object, recipe: str, scene: tuple[Path, Path, int]) -> None:
    shards, files, images = scene
    settings = Settings(shards, files, None, recipe, side=32, batch=16, workers=1, prefetch=1, warmup=1)
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
    [("read", "local storage"), ("decode", "--resize 400"), ("crop", "antialias"), ("augment", "data.workers")],
)
def test_advice_names_the_bottleneck(largest: str, says: str) -> None:
    spent = {"read": 0.1, "decode": 0.1, "crop": 0.1, "augment": 0.1, "finish": 9.0, "mix": 0.1} | {largest: 0.5}
    report = {"split_ms": spent, "target_images_per_second": 2000, "stored_kilobytes": 110.0}
    cores, knob = advice(report)
    assert says in knob and "56%" in knob
    assert "1.8 cores" in cores and "data.workers=2" in cores


def test_where_the_time_goes(scene: tuple[Path, Path, int]) -> None:
    shards, files, _ = scene
    settings = Settings(shards, files, None, "nest", side=32, batch=16, workers=1, prefetch=1, warmup=1)
    spent = split(settings, batches=2)
    assert set(spent) == {"read", "decode", "crop", "augment", "finish", "mix"}
    assert all(0 <= milliseconds < 50 for milliseconds in spent.values()) and spent["decode"] > 0


def test_the_command(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    options = "--no-peers --side 32 --batch 8 --workers 1 --samples 190 --repeats 2 --target 3000 --out"
    result = CliRunner().invoke(cli._commands, ["bench", "loader", str(photos), *options.split(), str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    own, smooth = report["loaders"]
    assert (own["name"], smooth["name"]) == ("rookery", "rookery, antialiased")
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
