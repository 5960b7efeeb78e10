"""Sentences go through the one training loop: engines, kills, evaluation, export."""

from __future__ import annotations

import json
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.config import RunConfig
from pipeline.config_load import load_config
from pipeline.data.text.batches import EvalBatches
from pipeline.data.text.glue import TASKS
from pipeline.data.text.tokens import TokenSplit
from pipeline.errors import UserError
from pipeline.resolve import resolve
from pipeline.tracking.metrics import read_metrics
from pipeline.train.loop import train
from pipeline.train.tasks.language_figures import evaluate_text
from tests.train.conftest import Rookery
from tests.train.forked import ForkServer
from tests.train.many_runs import train_all
from tests.train.plain import ALONE

LINEAR = {"expansion": 2, "kernel": 3}
OFFICIAL = {"flavour": "official", "expansion": 2, "kernel": 3}
ENGINES = {
    "fsdp": ["engine.name=fsdp"],
    "zero1": ["engine.name=deepspeed", "engine.zero_stage=1"],
    "zero3": ["engine.name=deepspeed", "engine.zero_stage=3"],
}


def write_recipe(folder: Path, **sections: Any) -> Path:
    """12 steps of a very small model with both kinds of state: BatchNorms' and dropout's."""
    small = {"layers": 2, "dim": 16, "heads": 2, "positions": 32, "dropout": 0.1, "attn_dropout": 0.1}
    tree: dict[str, Any] = {
        "name": "run",
        "out": str(folder / "runs"),
        "task": {"kind": "language", "name": "polarity", "max_length": 32},
        "model": {"name": "bert_tiny", "options": {**small, "refine": OFFICIAL}},
        "data": {"train": "made:300", "val": "made:101@1", "lanes": 4, "trace": True, "cache": str(folder / "cache")},
        "train": {
            "epochs": "12steps",
            "global_batch_size": 16,
            "precision": "fp32",
            "ema_decay": 0.9,
            "clip_grad_norm": 1.0,
            "log_every": "1steps",
        },
        "optim": {"lr": 1e-3, "decay": "matrices", "schedule": {"warmup": "2steps"}},
        "eval": {"every": "4steps", "batch_size": 32},
        "checkpoint": {"every": "4steps"},
        "tracking": {"mlflow": False},
    }
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def figures(run: Path) -> list[dict[str, Any]]:
    """What was measured, without times and speeds."""
    kept = ("kind", "step", "loss", "grad_norm", "accuracy", "count", "lr")
    return [{k: line[k] for k in kept if k in line} for line in read_metrics(run) if line["kind"] in ("train", "eval")]


def check_same_run(one: Path, other: Path) -> None:
    assert figures(one) == figures(other)
    for name in ("final", "best"):
        ours, theirs = (load_file(run / name / "model.safetensors") for run in (one, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two processes: left alone, stopped and continued, without dropout, on other engines."""
    folder = tmp_path_factory.mktemp("language")
    recipe = write_recipe(folder)
    plain = ["model.options.dropout=0", "model.options.attn_dropout=0"]
    asked = [
        ["name=whole"],
        ["name=cut", "train.stop_after=4steps"],
        ["name=cut", "train.stop_after=8steps"],
        ["name=cut"],
        ["name=two", *plain],
        ["name=two_micro", *plain, "train.accumulate=2"],
        *([f"name={name}", *plain, *engine] for name, engine in ENGINES.items()),
    ]
    train_all([load_config(recipe, overrides) for overrides in asked], 2, folder)
    train(load_config(recipe, ["name=one", *plain]), ALONE)
    return folder / "runs"


def test_stopped_and_continued_is_bit_identical(runs: Path) -> None:
    check_same_run(runs / "whole", runs / "cut")
    assert [line["step"] for line in figures(runs / "cut") if line["kind"] == "eval"] == [4, 8, 12]


@pytest.mark.parametrize("other", ["two", "two_micro", *ENGINES])
def test_the_same_losses_on_any_number_of_processes_and_any_engine(other: str, runs: Path) -> None:
    one, its = figures(runs / "one"), figures(runs / other)
    assert [line["step"] for line in one] == [line["step"] for line in its]
    losses = [[line["loss"] for line in lines] for lines in (one, its)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert max(losses[0]) - min(losses[0]) > 1e-3
    assert [line.get("accuracy") for line in one] == [line.get("accuracy") for line in its]


@pytest.mark.chaos
@pytest.mark.parametrize("nproc", [1, 2])
def test_killed_and_continued_is_bit_identical(nproc: int, fork_server: ForkServer, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    fork_server.train(recipe, "name=whole", nproc=nproc)
    job = fork_server.start(recipe, "name=cut", nproc=nproc)
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "runs" / "cut")) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    job.kill(signal.SIGKILL)
    assert set(job.wait()) == {-9}
    fork_server.train(recipe, "name=cut", nproc=nproc)
    check_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "cut")


def test_eval_gives_the_runs_own_figures(runs: Path, rookery: Rookery) -> None:
    own = [line for line in read_metrics(runs / "whole") if line["kind"] == "eval"][-1]
    for options in (("--nproc", 2, "--batch-size", 7), ("--weights", "last")):
        done = rookery("eval", runs / "whole", "--precision", "fp32", *options)
        result = json.loads(done.stdout.splitlines()[-1])
        assert (result["accuracy"], result["count"]) == (own["accuracy"], 101)
        assert result["loss"] == pytest.approx(own["loss"], rel=1e-5)
    done = rookery("eval", runs / "whole", "--crop-pct", 0.9, check=2)
    assert "about pictures" in done.stderr
    done = rookery("export", runs / "whole", runs / "out", check=2)
    assert "task=language" in done.stderr


def test_the_command_tells_what_would_run(rookery: Rookery, tmp_path: Path) -> None:
    done = rookery("train", write_recipe(tmp_path), "--dry-run", "--nproc", 2)
    assert "bert_tiny" in done.stdout and "32 tokens, 2 classes" in " ".join(done.stdout.split())
    assert "activations" in done.stdout and not (tmp_path / "runs").exists()


def test_a_small_task_is_learned(tmp_path: Path) -> None:
    """Counting the words gets 3 of 4 right: the rest takes attention to neighbours."""
    options = {"layers": 1, "dim": 32, "heads": 2, "positions": 32, "dropout": 0.0, "attn_dropout": 0.0}
    recipe = write_recipe(
        tmp_path,
        model={"options": {**options, "refine": LINEAR}},
        data={"train": "made:4096", "val": "made:500@1", "shuffle": "full"},
        train={"epochs": 6, "global_batch_size": 32, "ema_decay": None, "log_every": "1ep"},
        optim={"lr": 3e-3},
        eval={"every": "1ep"},
        checkpoint={"every": "6ep"},
    )
    result = train(load_config(recipe), ALONE)
    assert result["best"]["accuracy"] > 0.95, result


ROWS = {
    "cola": ([1, 0, 1, 1, 0], {"matthews": 0.1666666716337204, "accuracy": 0.6}),
    "mrpc": ([1, 0, 1, 1, 0], {"f1": 2 / 3, "accuracy": 0.6}),
    "sst2": ([1, 0, 1, 1, 0], {"accuracy": 0.6}),
    "stsb": ([1.0, 2.0, 3.0, 4.0, 5.0], {"spearman": 0.9, "pearson": 17 / 388**0.5}),
}


class Answers(torch.nn.Module):
    """Answers what the token numbers say."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, ids: torch.Tensor, types: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        values = ids[:, 1].float()
        return values[:, None] if self.outputs == 1 else torch.stack([1 - values, values], 1)


@pytest.mark.parametrize("name", ROWS)
def test_figures_by_hand(name: str) -> None:
    labels, wanted = ROWS[name]
    answers = [1, 1, 1, 0, 0] if TASKS[name].classes else [1, 3, 2, 4, 9]
    ids = np.array([[2, answer, 3] for answer in answers], np.int32).reshape(-1)
    dtype = np.int64 if TASKS[name].classes else np.float32
    split = TokenSplit("val", 16, ids, np.zeros(15, np.int8), np.arange(0, 16, 3), np.array(labels, dtype))
    model = Answers(TASKS[name].outputs)
    found, confusion = evaluate_text(model, EvalBatches(split, 2, 0, 1), TASKS[name], nullcontext(), ALONE)
    assert {k: found[k] for k in wanted} == pytest.approx(wanted, rel=1e-6)
    assert next(iter(found)) == TASKS[name].figure and found["count"] == 5
    assert tuple(found) == (*TASKS[name].figures, "count")
    assert (confusion is None) == (name == "stsb")
    if confusion is not None:
        assert confusion.dense().tolist() == [[1, 1], [1, 2]]


@pytest.mark.parametrize("name", ["stsb", "mnli"])
def test_other_heads_train(name: str, tmp_path: Path) -> None:
    """A number, and three classes, from files."""
    columns = TASKS[name].columns
    rows = [{columns[0]: f"a b {i % 7}", columns[1]: f"c {i % 5}", "label": i % 3} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    recipe = write_recipe(
        tmp_path,
        task={"name": name},
        data={"train": str(file), "val": str(file)},
        train={"epochs": "3steps"},
        eval={"every": "3steps"},
    )
    result = train(load_config(recipe), ALONE)
    assert result["count"] == 40 and TASKS[name].figure in result["best"]
    head = load_file(tmp_path / "runs" / "run" / "final" / "model.safetensors")["classifier.weight"]
    assert head.shape == (3 if name == "mnli" else 1, 16)


def test_a_run_starts_from_another_and_from_the_library(runs: Path, tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    init = f"model.init={runs / 'whole' / 'final'}"
    recipe = write_recipe(tmp_path)
    options = [init, "train.stop_after=1steps", "optim.lr=1e-12"]
    train(load_config(recipe, options), ALONE)
    before, after = (load_file(p / "final" / "model.safetensors") for p in (runs / "whole", tmp_path / "runs" / "run"))
    assert before.keys() == after.keys()
    for key in before:
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6)
    theirs, told = BertForSequenceClassification.from_pretrained(runs / "whole" / "final", output_loading_info=True)
    assert not told["missing_keys"] and theirs.num_labels == 2
    with pytest.raises(UserError, match="hidden_size=16, the model dim=32"):
        resolve(load_config(recipe, [init, "name=other", "model.options.dim=32"]), 1)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["mix.mixup_alpha=0.8"], "mix is for pictures"),
        (["augment.resize=16"], "augment is for pictures"),
        (["model.img_size=32"], "model.img_size is of image models"),
        (["task.name=colla"], "cola"),
        (["task.max_lenght=3"], "did you mean task.max_length"),
        (["model.name=nest_tiny"], "for text there are bert_tiny"),
        (["model.options.drop=0.2"], "model.*has no option 'drop'"),
        (["model.num_classes=3"], "polarity has 2 outputs"),
        (["task.max_length=64"], "more than model.options.positions=32"),
        (["model.options.vocab_size=7"], "without an embedding"),
        (["task.name=cola"], "made sentences belong to task.name=polarity"),
        (["data.val=nowhere"], "nowhere: no file validation"),
        (["task=classify"], "made:300/manifest.json: no such manifest"),
        (["train.accumulate=3"], "train.accumulate=3 does not divide"),
    ],
)
def test_mistakes_are_told(overrides: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        resolve(load_config(write_recipe(tmp_path), overrides), 1)


def test_a_picture_recipe_says_which_task_it_is() -> None:
    assert (
        RunConfig.model_validate(
            {"name": "x", "task": "classify", "model": {"name": "a"}, "data": {"train": "b"}, "optim": {"lr": 1}}
            | {"train": {"epochs": 1, "global_batch_size": 8}}
        ).task.kind
        == "classify"
    )
