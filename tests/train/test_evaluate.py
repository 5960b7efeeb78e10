"""Evaluation counts every sample exactly once at any number of processes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from typer.testing import CliRunner

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from launch.eval_cli import evaluate, find_job
from pipeline.config import RunConfig
from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig
from pipeline.data.augment.transforms import build_eval_transform
from pipeline.data.fast.decode import decode_image
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.models import create_model
from pipeline.tracking.confusion import BEST_NAME, NEWEST_NAME, Confusion
from pipeline.tracking.record import summarize
from pipeline.train.distributed import World
from pipeline.train.eval_worker import EvalJob, run_job
from pipeline.train.export import describe, load_weights, write_weights
from pipeline.train.trained import Trained
from tests.train.conftest import Rookery
from tests.train.forked import ForkServer

app = typer.Typer()
app.command()(evaluate)


def computed_by_hand(weights: Path, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels in one process, without batches of the loader or padding."""
    model, described = load_weights(weights)
    shards = ShardSet(data)
    augment = AugmentConfig.model_validate(described["augment"])
    settings = EvalTransformConfig.model_validate(described["eval_transform"])
    overrides = described["overrides"]
    transform = build_eval_transform(settings, augment, overrides["img_size"], overrides["in_chans"])
    samples = list(shards.read(range(len(shards))))
    images = torch.stack([transform(decode_image(sample.data, overrides["in_chans"])) for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    with torch.no_grad():
        return torch.cat([model.eval()(part) for part in images.split(500)]), labels


def counted_by_hand(weights: Path, data: Path) -> dict[str, float]:
    """The figures, sample by sample."""
    logits, labels = computed_by_hand(weights, data)
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


@pytest.mark.parametrize("nproc", [1, 3])
def test_confusion_matrix_counts_every_sample_once(
    nproc: int, recipe: Path, fork_server: ForkServer, digits: Path, tmp_path: Path
) -> None:
    fork_server.train(recipe, "train.stop_after=4steps", "eval.every=2steps", "train.ema_decay=null", nproc=nproc)
    run = tmp_path / "runs" / "run"
    for name, which in ((NEWEST_NAME, "final"), (BEST_NAME, "best")):
        matrix, classes, _ = Confusion.load(run / name)
        assert classes == [str(digit) for digit in range(10)]
        logits, labels = computed_by_hand(run / which, digits / "test")
        expected = torch.zeros(10, 10, dtype=torch.int64)
        expected.index_put_((labels, logits.argmax(dim=1)), torch.tensor(1), accumulate=True)
        assert matrix.dense().tolist() == expected.tolist()
        hits, samples = matrix.per_class()
        assert samples.sum() == 360 and hits.tolist() == expected.diagonal().tolist()


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
        (["nowhere"], ["nowhere", "no such directory"]),
        (["{run}/config.yaml"], ["config.yaml: a file; name a run directory"]),
        (["{run}/.."], ["neither a run directory", "it holds the runs run: name one of them"]),
        (["{run}", "--weights", "middle"], ["no such weights", "best and final and last"]),
        (["{run}/final"], ["pass --data"]),
        (["{run}/final", "--weights", "best"], ["final: no run", "--weights best; leave it out"]),
        (["{run}", "--precision", "fp8"], ["fp8", "bf16"]),
        (["{run}", "--output", "{run}"], ["a folder; name a file"]),
        (["{run}", "--output", "nowhere/result.json"], ["can't be written (there is no folder nowhere)"]),
        (["{run}", "--calibrate", "1:2"], ["--calibrate 1:2: write FIRST:LAST:STEP"]),
        (["{run}", "--calibrate", "1", "--crop-pct", "1"], ["choose one of them"]),
        (["{run}", "--holdout", "0.5"], ["add --calibrate"]),
        (["{run}", "--calibrate", "1", "--holdout", "1"], ["--holdout 1: a part of the samples"]),
    ],
)
def test_mistakes(arguments: list[str], expected: list[str], trained: Path) -> None:
    """All of them are found before anything is evaluated."""
    outcome = CliRunner().invoke(app, [a.format(run=trained) for a in arguments])
    assert isinstance(outcome.exception, UserError)
    for text in expected:
        assert text in str(outcome.exception)


def test_no_such_split(trained: Path, rookery: Rookery) -> None:
    done = rookery("eval", trained, "--data", "nowhere", check=2)
    assert "Traceback" not in done.stderr
    assert "nowhere" in done.stderr and "rookery prep" in done.stderr


@pytest.fixture
def unfinished(trained: Path, tmp_path: Path) -> Path:
    """The trained run without the exports, as it is between two evaluations."""
    run = tmp_path / "unfinished"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("final", "best"))
    return run


def run_here(job: EvalJob) -> dict[str, Any]:
    return run_job(replace(job, workers=0), World(0, 1, 0, torch.device("cpu")))


def test_the_checkpoint_of_an_unfinished_run(unfinished: Path, trained: Path) -> None:
    job = find_job(unfinished, None, None, None)
    assert (job.weights, job.step) == (str(unfinished / "checkpoints" / "step-00000012"), 12)
    result, final = run_here(job), run_here(find_job(trained, None, None, None))
    assert result["step"] == 12 and "step" not in final
    assert {k: v for k, v in result.items() if k not in ("weights", "step")} == {
        k: v for k, v in final.items() if k != "weights"
    }
    (unfinished / "checkpoints" / "step-00000012" / "commit.json").unlink()
    assert find_job(unfinished, None, None, None).step == 10
    state = unfinished / "checkpoints" / "step-00000010" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    told = (
        "none of its checkpoints is whole .*step-00000012: commit.json is missing.; restore its files from a copy, or "
    )
    for wanted in (None, "last"):
        with pytest.raises(UserError, match=f"no last weights; {told}train the run again"):
            find_job(unfinished, wanted, None, None)
    shutil.copytree(trained / "best", unfinished / "best")
    with pytest.raises(UserError, match=f"{told}choose --weights best"):
        find_job(unfinished, None, None, None)
    shutil.rmtree(unfinished / "best")
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(UserError, match="no final weights and no complete checkpoint yet"):
        find_job(unfinished, None, None, None)


def test_a_checkpoint_gives_the_weights_that_the_run_evaluates(unfinished: Path) -> None:
    config = (unfinished / "config.yaml").read_text()
    (unfinished / "config.yaml").write_text(config.replace("weights: model", "weights: ema"))
    job = find_job(unfinished, "last", None, None)
    model = Trained.from_checkpoint(unfinished, Path(job.weights)).model
    saved = torch.load(Path(job.weights) / "state.pt", weights_only=True)
    assert saved["ema"].keys() == saved["model"].keys() == model.state_dict().keys() and saved["averaged"] > 0
    assert any(not torch.equal(value, saved["model"][name]) for name, value in model.state_dict().items())
    for name, value in model.state_dict().items():
        assert torch.equal(saved["ema"][name], value)


@pytest.mark.parametrize(
    ("started_in", "here", "found"),
    [
        ("{digits}", "{tmp}", "{digits}/test"),
        ("{digits}", "{digits}", "test"),
        ("{tmp}/moved", "{digits}", "test"),
        ("{tmp}/moved", "{tmp}", "test"),  # nowhere: the message has the path of the config
        (None, "{tmp}", "test"),
    ],
)
def test_data_of_a_run_that_was_started_in_another_folder(
    started_in: str | None,
    here: str,
    found: str,
    unfinished: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {"digits": digits, "tmp": tmp_path}
    config = (unfinished / "config.yaml").read_text()
    assert f"val: {digits}/test" in config and f"train: {digits}/train" in config
    (unfinished / "config.yaml").write_text(config.replace(f"{digits}/", ""))
    facts = json.loads((unfinished / "facts.json").read_text())
    assert facts.pop("folder")
    facts |= {} if started_in is None else {"folder": started_in.format(**places)}
    (unfinished / "facts.json").write_text(json.dumps(facts))
    monkeypatch.chdir(here.format(**places))
    job = find_job(unfinished, None, None, None)
    assert job.data == found.format(**places)
    if (Path.cwd() / job.data).exists():
        assert Trained.from_checkpoint(unfinished, Path(job.weights)).classes == [str(digit) for digit in range(10)]
    assert find_job(unfinished, None, "test", None).data == "test"  # a folder that was named is taken as it is


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_are_those_of_the_run(deterministic: bool, unfinished: Path) -> None:
    config = (unfinished / "config.yaml").read_text()
    assert config.count("deterministic: true") == 1
    (unfinished / "config.yaml").write_text(config.replace("deterministic: true", f"deterministic: {deterministic}"))
    assert find_job(unfinished, None, None, None).deterministic == deterministic


def test_a_run_that_was_told_to_stop_is_not_finished(trained: Path) -> None:
    summary = summarize(trained)
    assert (summary.state, summary.step, summary.total_steps) == ("stopped", 12, 24)


def test_an_aux_head_is_weighed_as_asked_for(digits: Path, tmp_path: Path) -> None:
    """The logits of a Refiner with token labels, and of its class token alone, from the same weights."""
    options = {"patch_size": 8, "embed_dim": 24, "num_heads": 4, "depth": 2}
    tree: dict[str, Any] = {"name": "x", "data": {"train": "x"}, "optim": {"lr": 1}}
    tree |= {"train": {"epochs": 1, "global_batch_size": 8}, "eval_transform": {"resize": "resize_only"}}
    tree |= {"augment": {"resize": 16, "crop": "none", "normalize": "half"}}
    torch.manual_seed(0)
    weights = create_model("refiner_vit_s", img_size=16, in_chans=1, num_classes=10, **options).state_dict()
    for name in ("head.weight", "aux_head.weight"):
        weights[name].normal_()
    losses = []
    for weight in (0.5, 0.0, 2.0):
        model = {"name": "refiner_vit_s", "img_size": 16, "in_chans": 1, "num_classes": 10}
        model |= {"options": options | {"aux_weight": weight}}
        folder = tmp_path / str(weight)
        folder.mkdir()
        config = RunConfig.model_validate(tree | {"model": model})
        write_weights(folder, weights, describe(config, ShardSet(digits / "test").manifest.classes, {}))
        expected = counted_by_hand(folder, digits / "test")
        job = EvalJob(str(tmp_path / "0.5"), str(digits / "test"), batch_size=120, workers=0, aux_weight=weight)
        found = run_job(job, World(0, 1, 0, torch.device("cpu")))
        assert found["aux_weight"] == weight
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        losses.append(found["loss"])
    assert len(set(losses)) == 3


def test_a_loss_that_is_no_number_is_told_in_json(
    trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a string: JSON has no such numbers, and strict readers refuse the word."""
    model, described = load_weights(trained / "final")
    write_weights(tmp_path, {name: t.fill_(torch.nan) for name, t in model.state_dict().items()}, described)
    job = EvalJob(str(tmp_path), str(digits / "test"), workers=0, output=str(tmp_path / "found.json"))
    run_job(job, World(0, 1, 0, torch.device("cpu")))
    for text in (capsys.readouterr().out.splitlines()[-1], (tmp_path / "found.json").read_text()):
        assert json.loads(text, parse_constant=pytest.fail)["loss"] == "NaN"


def test_weights_without_an_aux_head_refuse_its_weight(trained: Path, digits: Path) -> None:
    job = EvalJob(str(trained / "final"), str(digits / "test"), workers=0, aux_weight=0.0)
    with pytest.raises(UserError, match=r"--aux-weight: nest_micro of .* has no aux head; leave it out"):
        run_job(job, World(0, 1, 0, torch.device("cpu")))
    with pytest.raises(UserError, match="--aux-weight -1: a weight of logits, 0 or above"):
        evaluate(trained, aux_weight=-1.0)
