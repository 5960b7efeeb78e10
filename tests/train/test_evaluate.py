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
    images = torch.stack([transform(decode(sample.data, overrides["in_chans"])) for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    with torch.no_grad():
        logits = torch.cat([model.eval()(part) for part in images.split(500)])
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    return {
        "top1": (ranks == 0).float().mean(dtype=torch.float64).item(),
        "top5": (ranks < 5).float().mean(dtype=torch.float64).item(),
        "loss": F.cross_entropy(logits.double(), labels).item(),
    }


def test_digits_at_1_2_and_3_processes(trained: Path, rookery: Rookery, digits: Path) -> None:
    expected = counted_by_hand(trained / "final", digits / "test")
    for nproc in (1, 2, 3):
        done = rookery("eval", trained, "--nproc", nproc, "--batch-size", 64, "--workers", 0)
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["count"] == 360
        assert (result["top1"], result["top5"]) == (expected["top1"], expected["top5"])
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_cifar10_test_split_at_1_2_and_3_processes(
    recipe: Path, rookery: Rookery, tmp_path: Path, real_data: Path
) -> None:
    shards = tmp_path / "cifar10"
    prepare_splits(str(real_data / "cifar10" / "test.parquet"), shards, PrepOptions(workers=2))
    model = ("model.in_chans=3", "model.img_size=32", "model.options.patch_size=2")
    rest = ("augment.resize=null", "augment.normalize=cifar10", "eval_transform.resize=none")
    split = next(shards.iterdir())
    rookery("train", recipe, *model, *rest, f"data.train={split}", "data.val=null", "train.stop_after=2steps")
    run = tmp_path / "runs" / "run"
    results = []
    for nproc in (1, 2, 3):
        options = ("--batch-size", 256, "--workers", 0, "--output", "result.json")
        done = rookery("eval", run, "--data", split, "--nproc", nproc, *options)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        assert json.loads((tmp_path / "result.json").read_text()) == results[-1]
    assert {r["count"] for r in results} == {10_000}
    assert len({(r["top1"], r["top5"]) for r in results}) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], ["nowhere", "neither a run directory"]),
        (["{run}", "--weights", "middle"], ["no such weights", "best and final"]),
        (["{run}", "--data", "nowhere"], ["nowhere", "rookery prep"]),
        (["{run}", "--precision", "fp8"], ["fp8", "bf16"]),
    ],
)
def test_mistakes(arguments: list[str], expected: list[str], trained: Path, rookery: Rookery) -> None:
    done = rookery("eval", *(a.format(run=trained) for a in arguments), check=2)
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.stderr
