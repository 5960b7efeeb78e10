"""Evaluation counts every sample exactly once at any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig
from pipeline.data.augment.transforms import build_eval_transform
from pipeline.data.loader import decode
from pipeline.data.shards import ShardSet
from pipeline.train.export import load_weights
from tests.train.conftest import Rookery


def counted_by_hand(weights: Path, data: Path) -> dict[str, float]:
    """Sample by sample in one process, without batches or padding."""
    model, described = load_weights(weights)
    shards = ShardSet(data)
    augment = AugmentConfig.model_validate(described["augment"])
    settings = EvalTransformConfig.model_validate(described["eval_transform"])
    overrides = described["overrides"]
    transform = build_eval_transform(settings, augment, overrides["img_size"], overrides["in_chans"])
    samples = list(shards.read(range(len(shards))))
    images = torch.stack([transform(decode(sample, overrides["in_chans"], shards)) for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    with torch.no_grad():
        logits = torch.cat([model.eval()(part) for part in images.split(500)])
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    return {
        "top1": (ranks == 0).float().mean(dtype=torch.float64).item(),
        "top5": (ranks < 5).float().mean(dtype=torch.float64).item(),
        "loss": F.cross_entropy(logits.double(), labels).item(),
    }


@pytest.mark.parametrize("batch_size", [50, 64])
def test_digits_at_1_2_and_3_processes(
    batch_size: int, recipe: Path, rookery: Rookery, tmp_path: Path, digits: Path
) -> None:
    rookery("train", recipe, "train.stop_after=12steps", "eval.every=100steps")
    run = tmp_path / "runs" / "run"
    expected = counted_by_hand(run / "final", digits / "test")
    for nproc in (1, 2, 3):
        done = rookery("eval", run, "--nproc", nproc, "--batch-size", batch_size, "--workers", 0)
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["count"] == 360
        assert (result["top1"], result["top5"]) == (expected["top1"], expected["top5"])
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_cifar10_test_split_at_1_2_and_3_processes(
    recipe: Path, rookery: Rookery, tmp_path: Path, real_data: Path
) -> None:
    shards = tmp_path / "cifar10"
    prepare_splits(str(real_data / "cifar10" / "test.parquet"), shards, PrepOptions(workers=2))
    model = ("model.in_chans=3", "model.img_size=32")
    rest = ("augment.resize=null", "augment.normalize=cifar10", "eval_transform.resize=none")
    split = next(shards.iterdir())
    data = (f"data.train={split}", f"data.val={split}")
    rookery("train", recipe, *model, *rest, *data, "train.stop_after=2steps", "eval.batch_size=250", "--nproc", 2)
    run = tmp_path / "runs" / "run"
    results = []
    for nproc in (1, 2, 3):
        done = rookery("eval", run, "--nproc", nproc, "--batch-size", 256, "--workers", 1, "--output", "result.json")
        results.append(json.loads(done.stdout.splitlines()[-1]))
        assert json.loads((tmp_path / "result.json").read_text()) == results[-1]
    assert {r["count"] for r in results} == {10_000}
    assert len({(r["top1"], r["top5"]) for r in results}) == 1
    trained = json.loads((run / "result.json").read_text())
    assert (trained["top1"], trained["count"]) == (results[0]["top1"], 10_000)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], ["nowhere", "neither a run directory"]),
        (["{run}", "--weights", "middle"], ["no such weights", "best and final"]),
        (["{run}", "--data", "nowhere"], ["nowhere", "rookery prep"]),
        (["{run}", "--precision", "fp8"], ["fp8", "bf16"]),
    ],
)
def test_mistakes(arguments: list[str], expected: list[str], recipe: Path, rookery: Rookery, tmp_path: Path) -> None:
    rookery("train", recipe, "train.stop_after=1steps")
    done = rookery("eval", *(a.format(run=tmp_path / "runs" / "run") for a in arguments), check=2)
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.stderr
