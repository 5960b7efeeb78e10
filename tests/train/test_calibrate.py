"""The search for the best crop ratio: which ratios, which samples are held out, and what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from pipeline.data.augment.settings import EvalTransformConfig
from pipeline.data.augment.transforms import build_eval_transform
from pipeline.data.fast.decode import decode_image
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.train.calibrate import Ratio, best_of, held_out, parse_ratios, report, table, with_ratio
from pipeline.train.distributed import World
from pipeline.train.eval_worker import EvalJob, run_job
from pipeline.train.export import MODEL_CONFIG, WEIGHTS, write_weights
from pipeline.train.trained import Trained
from tests.train.conftest import Rookery


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.8:1.2:0.05", [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2]),
        ("0.8:1.0:0.15", [0.8, 0.95]),
        ("1:1:0.1", [1.0]),
        ("1.1, 0.9,1,1.1", [0.9, 1.0, 1.1]),
    ],
)
def test_ratios(text: str, expected: list[float]) -> None:
    assert parse_ratios(text) == expected


@pytest.mark.parametrize("text", ["", "a", "0.8:1.2", "1:2:0", "1.2:0.8:0.1", "0,1", "-1:1:0.1", "nan", "0.1:2:0.001"])
def test_what_are_no_ratios(text: str) -> None:
    with pytest.raises(UserError, match="write FIRST:LAST:STEP"):
        parse_ratios(text)


def test_a_run_that_did_not_crop_does_so_with_a_ratio() -> None:
    settings = with_ratio(EvalTransformConfig(resize="resize_only", interpolation="bilinear"), 1.1)
    assert (settings.resize, settings.crop_pct, settings.interpolation) == ("crop_pct", 1.1, "bilinear")


@pytest.mark.parametrize(
    ("ratio", "antialias", "message"),
    [
        (2.5, True, "crop ratio 2.5: input should be less than"),
        (1.1, False, "crop ratio 1.1: .* needs antialias: true"),
    ],
)
def test_ratios_that_an_evaluation_refuses(ratio: float, antialias: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_ratio(EvalTransformConfig(interpolation="bilinear", antialias=antialias), ratio)


def test_what_is_held_out_depends_on_the_key_alone() -> None:
    keys = [f"{i:08d}_photo" for i in range(20_000)]
    half = held_out(keys, 0.5)
    turned = np.random.default_rng(0).permutation(len(keys))
    assert np.array_equal(held_out([keys[i] for i in turned], 0.5), half[turned])
    assert np.array_equal(held_out(keys[:100], 0.5), half[:100])
    for fraction in (0.1, 0.5, 0.9):  # 4 standard deviations
        assert abs(held_out(keys, fraction).mean() - fraction) < 4 * (fraction * (1 - fraction) / len(keys)) ** 0.5
    assert not (held_out(keys, 0.1) & ~half).any()  # a larger part holds the smaller one
    # Written down once: it must not change between releases.
    assert held_out(["a", "b", "c", "d", "e", "f"], 0.5).tolist() == [False, True, True, True, True, True]


@pytest.mark.parametrize(("keys", "fraction"), [(["a"], 0.5), ([f"{i}" for i in range(50)], 1e-9)])
def test_a_part_without_samples(keys: list[str], fraction: float) -> None:
    with pytest.raises(UserError, match="leaves nothing on one side"):
        held_out(keys, fraction)


def ratio(crop_pct: float, searched: float, held: float | None, loss: float = 1.0) -> Ratio:
    def figures(top1: float) -> dict[str, float]:
        return {"top1": top1, "top5": 1.0, "loss": loss, "count": 100}

    return Ratio(crop_pct, figures(0.5), figures(searched), None if held is None else figures(held))


def test_chosen_on_one_part_and_reported_on_the_other() -> None:
    results = [ratio(0.9, 0.70, 0.80), ratio(1.0, 0.75, 0.60), ratio(1.1, 0.75, 0.65, loss=0.9)]
    assert best_of(results).crop_pct == 1.1  # 1.0 is as good, with a higher loss
    said = report(results, 0.9, 0.5)
    assert (said["crop_pct"], said["top1"], said["own"]["top1"], said["holdout"]) == (1.1, 0.65, 0.80, 0.5)
    assert [r["crop_pct"] for r in said["ratios"]] == [0.9, 1.0, 1.1]
    assert table(results, 0.9).splitlines() == [
        "crop_pct     top1     top5      loss   on 100 samples",
        "     0.9   0.7000   1.0000    1.0000     the run's own",
        "       1   0.7500   1.0000    1.0000",
        "     1.1   0.7500   1.0000    0.9000   * best",
        "best ratio 1.1: top1 0.6500 on 100 samples held out; -0.1500 against the run's own 0.9",
    ]
    nothing_held_out = [ratio(1.0, 0.5, None)]
    assert report(nothing_held_out, None, 0)["own"] is None
    assert table(nothing_held_out, None).endswith("top1 0.5000 on the same 100 samples that it was chosen on")


def by_hand(trained: Trained, data: Path, crop_pct: float) -> dict[str, tuple[int, int]]:
    """(top-1 hit, top-5 hit) of every sample, by key, one batch in one process."""
    settings = with_ratio(trained.transform, crop_pct)
    transform = build_eval_transform(settings, trained.augment, trained.img_size, trained.in_chans)
    shards = ShardSet(data)
    samples = list(shards.read(range(len(shards))))
    images = torch.stack([transform(decode_image(sample.data, trained.in_chans)) for sample in samples])
    with torch.no_grad():
        logits = trained.model.eval()(images)
    labels = torch.tensor([sample.label for sample in samples])
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1).tolist()
    return {sample.key: (rank < 1, rank < 5) for sample, rank in zip(samples, ranks, strict=True)}


def fractions(hits: list[tuple[int, int]]) -> dict[str, float]:
    count = len(hits)
    return {"top1": sum(a for a, _ in hits) / count, "top5": sum(b for _, b in hits) / count, "count": count}


@pytest.fixture(scope="module")
def scattered(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported weights that are random, so that another crop gives other answers; the run's own ratio is 0.9."""
    directory = tmp_path_factory.mktemp("scattered")
    described = json.loads((trained / "final" / MODEL_CONFIG).read_text())
    described["eval_transform"] |= {"resize": "crop_pct", "crop_pct": 0.9}
    generator = torch.Generator().manual_seed(0)
    weights = load_file(trained / "final" / WEIGHTS)
    for name, value in weights.items():
        if value.ndim > 1:
            scale = 5.0 if name == "head.weight" else value[0].numel() ** -0.5
            weights[name] = torch.randn(value.shape, generator=generator) * scale
    write_weights(directory, weights, described)
    return directory


def test_a_search_at_1_2_and_3_processes(scattered: Path, rookery: Rookery, digits: Path) -> None:
    model = Trained.from_export(scattered)
    hits = {crop_pct: by_hand(model, digits / "test", crop_pct) for crop_pct in (0.75, 0.9, 1.25)}
    assert len({tuple(h.values()) for h in hits.values()}) == 3
    keys = list(hits[0.9])
    out = dict(zip(keys, held_out(keys, 0.4), strict=True))
    for nproc in (1, 2, 3):
        options = ("--nproc", nproc, "--batch-size", 50, "--workers", 0, "--calibrate", "0.75:1.25:0.5")
        done = rookery("eval", scattered, "--data", digits / "test", *options, "--holdout", 0.4)
        result = json.loads(done.stdout)
        assert [r["crop_pct"] for r in result["ratios"]] == list(hits)  # the run's own among them
        for found in result["ratios"]:
            one = hits[found["crop_pct"]]
            expected = {
                "whole": fractions(list(one.values())),
                "search": fractions([hit for key, hit in one.items() if not out[key]]),
                "holdout": fractions([hit for key, hit in one.items() if out[key]]),
            }
            for part, figures in expected.items():
                assert {k: found[part][k] for k in figures} == figures, (nproc, found["crop_pct"], part)
            assert found["search"]["count"] + found["holdout"]["count"] == found["whole"]["count"] == 360
        best = max(result["ratios"], key=lambda r: (r["search"]["top1"], -r["search"]["loss"]))
        assert (result["crop_pct"], result["top1"]) == (best["crop_pct"], best["holdout"]["top1"])
        assert result["own"] == {"crop_pct": 0.9, **result["ratios"][1]["holdout"]}
        assert (result["holdout"], result["count"]) == (0.4, sum(out.values()))
        assert f"best ratio {best['crop_pct']:g}: top1 {best['holdout']['top1']:.4f}" in done.stderr


def test_a_single_evaluation_gives_what_the_search_gives(scattered: Path, digits: Path, tmp_path: Path) -> None:
    one, output = World(0, 1, 0, torch.device("cpu")), tmp_path / "all.json"
    job = EvalJob(str(scattered), str(digits / "test"), batch_size=90, workers=0)
    searched = run_job(replace(job, ratios=[1.25], holdout=0, output=str(output)), one)
    assert json.loads(output.read_text()) == searched
    for found, crop_pct in zip(searched["ratios"], [None, 1.25], strict=True):
        single = run_job(replace(job, crop_pct=crop_pct), one)
        assert {k: single[k] for k in found["whole"]} == found["whole"] == found["search"]
        assert single.get("crop_pct", 0.9) == found["crop_pct"] and found["holdout"] is None


def test_the_parts_stay_the_same_when_the_shards_are_cut_otherwise(digits: Path, tmp_path: Path) -> None:
    prepare_splits("digits", tmp_path, PrepOptions(workers=1, shard_samples=50, shuffle=True), ["test"])

    def parts(data: Path) -> dict[str, bool]:
        shards = ShardSet(data)
        keys = shards.keys(range(len(shards)))
        return dict(zip(keys, held_out(keys, 0.5).tolist(), strict=True))

    one, other = parts(digits / "test"), parts(tmp_path / "test")
    assert list(one) != list(other) and one == other
