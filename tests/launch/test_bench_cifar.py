"""bench/cifar.sh at a tiny size: both runs, their file, and a second start that repeats nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from bench.cifar import minutes_of
from bench.cifar_resnet import resnet18
from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from tests.train.commands import ROOT, environment


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Pictures like CIFAR's, of noise that is lighter in every second one."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 300), ("test", 90)):
        for i in range(count):
            path = tmp_path / "pictures" / split / f"class{i % 2}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(100 * (i % 2), 156 + 100 * (i % 2), (32, 32, 3), dtype=np.uint8)).save(path)
        prepare(tmp_path / "pictures" / split, tmp_path / "shards", PrepOptions(workers=1), split)
    return tmp_path / "shards"


def bench(folder: Path, shards: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = [str(ROOT / "bench" / "cifar.sh"), str(shards), "--tiny", "--seeds", "0", "--out", "out.json", *options]
    return subprocess.run(script, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out.json").read_text())


def test_both_train_once(shards: Path, tmp_path: Path) -> None:
    done = bench(tmp_path, shards)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {run["name"]: run for run in written(tmp_path)["runs"]}
    assert runs.keys() == {"tiny-nest-recipe-0", "tiny-resnet-0"}
    for run in runs.values():
        assert [epoch for epoch, _, _ in run["curve"]] == [0.5, 1.0]
        assert 0 < run["curve"][0][1] < run["curve"][1][1] <= run["minutes"] + 0.1
        assert run["top1"] == run["curve"][-1][2] and 0 <= run["top1"] <= 1
    assert written(tmp_path)["versions"]["torch"] == torch.__version__.partition("+")[0]

    done = bench(tmp_path, shards)
    assert done.returncode == 0 and "step 4/4" not in done.stdout + done.stderr and "top-1" not in done.stdout
    assert {run["name"]: run for run in written(tmp_path)["runs"]} == runs

    done = bench(tmp_path, shards, "--only", "nest", "--triton")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {run["name"] for run in written(tmp_path)["runs"]} == {*runs, "tiny-nest-triton-recipe-0"}
    saved = yaml.safe_load((tmp_path / "runs/cifar_bench_tiny/tiny-nest-triton-recipe-0/config.yaml").read_text())
    assert saved["model"]["options"]["kernels"] == "triton"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "no train/manifest.json there"),
        (["--seeds", "a"], "'a' is no number of 0 or more"),
        (["--seeds", ""], "'' is no number of 0 or more"),
        (["--only", "nest,vit"], "'vit': there is resnet and nest"),
        (["--epochs", "5"], "leave --epochs out"),
        (["--runs", "/proc/x"], "choose another --runs"),
        (["--out", "/proc/x/y.json"], "/proc/x"),
    ],
)
def test_mistakes(options: list[str], expected: str, tmp_path: Path) -> None:
    for split in ("train", "test") if options else ():
        (tmp_path / split).mkdir()
        (tmp_path / split / "manifest.json").write_text("{}")
    done = bench(tmp_path, tmp_path, *options)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


def test_minutes_leave_pauses_out() -> None:
    """Two starts, 100 s apart, of which the first was killed 20 s after its last line that is kept."""
    sessions = [{"event": "start", "time": 1000.0}, {"event": "start", "time": 1100.0}, {"event": "end", "time": 0.0}]
    lines = [{"time": time} for time in (1010.0, 1030.0, 1106.0, 1166.0)]
    assert minutes_of(lines, sessions) == pytest.approx([1 / 6, 0.5, 0.6, 1.6])
    never = [{"event": "start", "time": 900.0}, *sessions]
    assert minutes_of(lines, never) == pytest.approx([1 / 6, 0.5, 0.6, 1.6])


def test_the_resnet_is_the_known_one() -> None:
    model = resnet18(10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    shapes = []
    model.get_submodule("layer1").register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10) and shapes == [(2, 64, 32, 32)]
