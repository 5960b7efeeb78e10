"""`rookery bench step`: figures that fit together, and mistakes in one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.bench_cli import _counts, fill_in
from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.train.bench_step import figures
from tests.train.commands import ROOT, run_command

RECIPE = ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_one_and_two_processes(engine: str, tmp_path: Path) -> None:
    small = ["model.options.depths=1", f"engine.name={engine}", "train.accumulate=2", "out=nowhere"]
    sizes = ["--steps", 2, "--warmup", 1, "--repeats", 3, "--batch", 8, "--threads", 1]
    done = run_command(tmp_path, "bench", "step", RECIPE, *small, "--nproc", "1,2", *sizes, "--out", "figures.json")
    report = json.loads((tmp_path / "figures.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"]
    assert report["command"].startswith("rookery bench step ") and "weak scaling: 8 samples" in " ".join(
        done.stdout.split()
    )
    expected = {"batch_per_process": 8, "steps": 2, "repeats": 3, "engine": engine, "scaling": "weak", "accumulate": 2}
    assert {key: report[key] for key in expected} == expected
    assert {"torch", "python"} <= report["versions"].keys() and "CPU" in report["device"]

    one, two = report["counts"]
    assert (one["processes"], two["processes"]) == (1, 2)
    each = [row["images_per_second_per_process"]["median"] for row in (one, two)]
    assert one["efficiency"] == 1 and two["efficiency"] == pytest.approx(each[1] / each[0])
    for row in (one, two):
        rate = row["images_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert rate["median"] == pytest.approx(row["processes"] * row["images_per_second_per_process"]["median"])
        assert 0.1 < row["memory_gb"] < 10
        assert f"{rate['median']:.1f}" in done.stdout
    assert one["communication"]["max"] == 0 and one["own_step_seconds"] == []
    assert 0 <= two["communication"]["min"] <= two["communication"]["max"] < 1
    own = two["own_step_seconds"]
    assert len(own) == 2 and own[two["slowest_rank"]] == max(own)
    assert two["slowest_by"] == pytest.approx(max(own) / (sum(own) / 2) - 1)


def test_figures_of_known_times() -> None:
    # 10 steps of 4 samples on 2 processes; a turn that the machine spent twice as slowly changes no share.
    measured = {"seconds": [2.0, 4.0, 1.0], "alone": [[1.0, 1.5], [2.0, 3.0], [0.9, 0.8]], "memory_gb": [1.0, 2.0]}
    result = figures(measured, processes=2, batch=4, steps=10)
    assert result["images_per_second"] == {"median": 40.0, "min": 20.0, "max": 80.0}
    assert result["images_per_second_per_process"]["median"] == 20.0
    assert result["communication"] == pytest.approx({"median": 0.25, "min": 0.1, "max": 0.25})
    assert result["own_step_seconds"] == pytest.approx([0.1, 0.15])
    assert (result["slowest_rank"], result["memory_gb"]) == (1, 2.0)
    assert result["slowest_by"] == pytest.approx(0.15 / 0.125 - 1)
    faster_together = figures(measured | {"seconds": [1.0, 1.0, 0.5]}, processes=2, batch=4, steps=10)
    assert faster_together["communication"] == {"median": 0.0, "min": 0.0, "max": 0.0}


@pytest.mark.parametrize("count", [1, 2, 6])
def test_every_process_does_the_same_work_at_any_count(count: int) -> None:
    config = fill_in(load_config(RECIPE), 24, count, None)
    lanes, chunk = config.data.lanes, config.train.global_batch_size // (config.data.lanes or 1)
    assert (config.train.global_batch_size, lanes, chunk) == (24 * count, 4 * count, 6)
    # The recipe leaves its classes to the data, so that the model's own count.
    assert config.model.num_classes == 1000 and config.model.img_size == load_config(RECIPE).model.img_size
    assert fill_in(load_config(RECIPE), 24, count, 7).model.num_classes == 7


@pytest.mark.parametrize("text", ["0", "1,0", "-1", "two", "1,,2", "", "2,2", "1.5"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(UserError, match="--nproc"):
        _counts(text)


MISTAKES: dict[str, tuple[list[Any], str]] = {
    "counts": (["--nproc", "1,x"], "--nproc 1,x"),
    "engine": (["engine.name=deepspeed"], "engine.name=ddp and fsdp"),
    "micro-batches": (["train.accumulate=3", "--batch", 8], "set --batch"),
    "file": (["--out", "missing/figures.json"], "--out"),
    "key": (["train.epoch=1"], "train.epochs"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, tmp_path: Path) -> None:
    arguments, message = MISTAKES[case]
    done = run_command(tmp_path, "bench", "step", RECIPE, *arguments, check=2)
    assert message in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_token_labels_are_named() -> None:
    recipe = load_config(ROOT / "configs" / "refiner" / "s_imagenet_token_labels.yaml")
    with pytest.raises(UserError, match=r"objective\.token_labels=false"):
        fill_in(recipe, 8, 1, None)
