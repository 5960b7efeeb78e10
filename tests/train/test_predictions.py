"""`rookery eval --predictions`: a line for every sample, in the order of the split."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from launch.eval_cli import evaluate
from pipeline.config import RunConfig
from pipeline.config_load import load_config
from pipeline.data.shards import ShardSet
from pipeline.data.text.glue import GLUE, TASKS
from pipeline.data.text.rows import read_rows
from pipeline.errors import UserError
from pipeline.models import create_model
from pipeline.train.eval_worker import EvalJob, run_job
from pipeline.train.export import describe, write_weights
from pipeline.train.predictions import Predictions
from pipeline.train.tasks.language import LanguageTask
from pipeline.train.tasks.language_eval import TrainedText
from tests.conftest import small_disk
from tests.train.conftest import Rookery
from tests.train.plain import ALONE
from tests.train.test_evaluate import computed_by_hand
from tests.train.test_language import write_recipe

app = typer.Typer()
app.command()(evaluate)


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def pictures_model(folder: Path, classes: Sequence[str]) -> Path:
    """Exported weights, random and far enough from 0 that the model is sure of something."""
    options: dict[str, Any] = {"depths": 1, "num_levels": 2, "embed_dims": [16, 32], "num_heads": [1, 2]}
    model = {"name": "nest_micro", "img_size": 16, "in_chans": 1, "num_classes": len(classes), "options": options}
    tree: dict[str, Any] = {"name": "x", "data": {"train": "x"}, "optim": {"lr": 1}, "model": model}
    tree |= {"train": {"epochs": 1, "global_batch_size": 8}, "eval_transform": {"resize": "resize_only"}}
    tree |= {"augment": {"resize": 16, "crop": "none", "normalize": "half"}}
    torch.manual_seed(0)
    weights = create_model("nest_micro", img_size=16, in_chans=1, num_classes=len(classes), **options).state_dict()
    weights["head.weight"].normal_()
    folder.mkdir(parents=True)
    write_weights(folder, weights, describe(RunConfig.model_validate(tree), list(classes), {}))
    return folder


def text_model(folder: Path, name: str, words: Sequence[str]) -> Path:
    """As `pictures_model`; it knows the words."""
    folder.mkdir(parents=True)
    train = folder / "words.jsonl"
    label = 1.5 if name == "stsb" else 0
    train.write_text(json.dumps(dict.fromkeys(TASKS[name].columns, " ".join(words)) | {"label": label}))
    data = {"train": str(train), "val": None, "cache": str(folder / "cache")}
    recipe = write_recipe(folder, task={"name": name}, data=data)
    task = LanguageTask(load_config(recipe))
    config, _ = task.fit(*task.splits())
    task = task.on(config)
    torch.manual_seed(0)
    weights = task.build_model("cpu").state_dict()
    for value in weights.values():
        if value.ndim == 2:
            value.normal_(std=0.5)
    write_weights(folder, weights, task.describe(list(TASKS[name].classes), {}))
    task.write_files(folder)
    return folder


WORDS = [f"w{i}" for i in range(24)] + ["not"]


def write_rows(folder: Path, name: str, rows: int = 23, **more: Any) -> Path:
    """Sentences without a label, or with what is given."""
    columns = TASKS[name].columns
    texts = np.random.default_rng(3).choice(WORDS, (rows, len(columns), 7))
    lines = [dict(zip(columns, map(" ".join, texts[i]), strict=True)) for i in range(rows)]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(line | {k: v(i) for k, v in more.items()}) for i, line in enumerate(lines)))
    return path


def answered_by_hand(model: Path, data: Path | str, name: str) -> torch.Tensor:
    """Logits, sample by sample, without padding."""
    trained = TrainedText.from_export(model)
    trained.model.eval()
    sentences = read_rows(str(data), name, TASKS[name], "validation", unlabelled=True).sentences
    found = []
    for texts in zip(*sentences, strict=True):
        one = trained.tokenizer.encode(*texts)
        ids, types = torch.tensor([one.ids]), torch.tensor([one.type_ids])
        with torch.no_grad():
            found.append(trained.model(ids, types, torch.ones_like(ids, dtype=torch.bool))[0])
    return torch.stack(found)


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, and what `datasets` makes of files, go to a folder of the test's."""
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "caches" / "datasets")


def run_here(job: EvalJob) -> dict[str, Any]:
    return run_job(replace(job, workers=0), ALONE)


def test_pictures_at_1_and_2_processes(digits: Path, rookery: Rookery, tmp_path: Path) -> None:
    shards = ShardSet(digits / "test")
    model = pictures_model(tmp_path / "model", shards.manifest.classes)
    logits, labels = computed_by_hand(model, digits / "test")
    # 360 samples in batches of 75: the last one of the second process is all padding.
    options = ("--nproc", 2, "--threads", 1, "--batch-size", 75, "--workers", 0)
    done = rookery("eval", model, "--data", digits / "test", *options, "--predictions", "2.csv")
    assert json.loads(done.stdout.splitlines()[-1])["count"] == 360
    run_here(EvalJob(str(model), str(digits / "test"), batch_size=75, predictions=str(tmp_path / "1.csv")))
    one, two = ((tmp_path / f"{nproc}.csv").read_bytes() for nproc in (1, 2))
    assert one == two and b"\r" not in one
    rows = table(tmp_path / "1.csv")
    assert list(rows[0]) == ["key", "label", "prediction", "probability"]
    assert [row["key"] for row in rows] == shards.keys(range(360)) and len({row["key"] for row in rows}) == 360
    assert [row["label"] for row in rows] == [str(i) for i in labels.tolist()]
    assert [row["prediction"] for row in rows] == [str(i) for i in logits.argmax(1).tolist()]
    sure = logits.double().softmax(1).amax(1)
    assert [float(row["probability"]) for row in rows] == pytest.approx(sure.tolist(), rel=1e-4)
    assert len({row["prediction"] for row in rows}) > 1 and sure.max() - sure.min() > 0.1


def test_names_of_every_kind(tmp_path: Path) -> None:
    """From folders to the file: keys, and classes by name."""
    names = ['a "quoted", one', "a\ttab", "two\nlines"]
    for i, name in enumerate(names):
        for k in range(2 + i):
            folder = tmp_path / "pictures" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 40 * (i + k)).save(folder / f'{name[0]}{k}, "x".png')
    prepare_splits(str(tmp_path / "pictures"), tmp_path / "shards", PrepOptions(workers=1))
    [split] = (tmp_path / "shards").iterdir()
    shards = ShardSet(split)
    model = pictures_model(tmp_path / "model", shards.manifest.classes)
    logits, labels = computed_by_hand(model, split)
    job = EvalJob(str(model), str(split), batch_size=4)
    for ending in ("csv", "tsv", "jsonl"):
        path = tmp_path / f"out.{ending}"
        run_here(replace(job, predictions=str(path)))
        rows: list[Any] = table(path) if ending != "jsonl" else [*map(json.loads, path.read_text().splitlines())]
        assert sorted(row["label"] for row in rows) == sorted(
            name for i, name in enumerate(names) for _ in range(2 + i)
        )
        assert [row["key"] for row in rows] == shards.keys(range(9))
        assert [row["label"] for row in rows] == [shards.manifest.classes[i] for i in labels]
        assert [row["prediction"] for row in rows] == [shards.manifest.classes[i] for i in logits.argmax(1)]
    assert isinstance(rows[0]["probability"], float)


def test_cells_survive(tmp_path: Path) -> None:
    cells = ["", "a,b", "a\tb", '"', 'a"b', "a\nb", "a\rb", "a\r\nb", " a ", "\u00e9\u4e2d", "'=1"]
    for ending in ("csv", "tsv", "jsonl"):
        path = tmp_path / f"cells.{ending}"
        Predictions(("x", "y", "z"), lambda: ((cell, 1, None) for cell in cells)).write(path)
        if ending == "jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert lines == [{"x": cell, "y": 1, "z": None} for cell in cells]
        else:
            assert table(path) == [{"x": cell, "y": "1", "z": ""} for cell in cells]
        Predictions(("x",), lambda: [["no text: \udcff"]]).write(path)
        assert "\\udcff" in path.read_text()


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_sentences_with_labels(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`polarity` is none of GLUE's: its .tsv is a table as others."""
    model, path = text_model(tmp_path / "model", "polarity", WORDS), tmp_path / f"out.{ending}"
    result = run_here(EvalJob(str(model), "made:23@5", batch_size=8, task="language", predictions=str(path)))
    logits = answered_by_hand(model, "made:23@5", "polarity")
    rows: list[Any] = table(path) if ending != "jsonl" else [*map(json.loads, path.read_text().splitlines())]
    labels = read_rows("made:23@5", "polarity", TASKS["polarity"], "validation").labels
    assert list(rows[0]) == ["key", "label", "prediction", "probability"]
    assert [int(row["key"]) for row in rows] == [*range(23)]
    assert [row["label"] for row in rows] == [("negative", "positive")[int(i)] for i in labels]
    assert [row["prediction"] for row in rows] == [("negative", "positive")[i] for i in logits.argmax(1)]
    assert len({row["prediction"] for row in rows}) == 2
    assert [float(row["probability"]) for row in rows] == pytest.approx(logits.softmax(1).amax(1).tolist(), rel=1e-4)
    assert result["accuracy"] == np.mean([row["label"] == row["prediction"] for row in rows])
    assert "no labels" not in capsys.readouterr().err


NO_LABELS: dict[str, dict[str, Any]] = {
    "none": {},
    "null": {"label": lambda i: None},
    "hidden": {"label": lambda i: -1},
    "numbered": {"label": lambda i: -1, "idx": lambda i: 1000 - i},
}


@pytest.mark.parametrize("kind", NO_LABELS)
@pytest.mark.parametrize("name", ["mnli", "stsb"])
def test_sentences_without_labels(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = text_model(tmp_path / "model", name, WORDS), write_rows(tmp_path, name, **NO_LABELS[kind])
    path = tmp_path / "out.csv"
    job = EvalJob(str(model), str(data), batch_size=8, task="language", predictions=str(path))
    assert run_here(job) == {"weights": str(model), "data": str(data), "count": 23, "task": name, "model": "bert_tiny"}
    assert f"{data}: no labels, nothing to measure; only predictions" in capsys.readouterr().err
    logits, rows = answered_by_hand(model, data, name), table(path)
    numbered = ["idx"] if kind == "numbered" else []
    assert list(rows[0]) == ["key", *numbered, "label", "prediction", "probability"]
    assert [row["key"] for row in rows] == [str(i) for i in range(23)]
    assert {row["label"] for row in rows} == {""}
    if numbered:
        assert [row["idx"] for row in rows] == [str(1000 - i) for i in range(23)]
    if name == "stsb":
        assert [float(row["prediction"]) for row in rows] == pytest.approx(logits[:, 0].tolist(), rel=1e-4, abs=1e-5)
        assert {row["probability"] for row in rows} == {""}
    else:
        assert [row["prediction"] for row in rows] == [TASKS[name].classes[i] for i in logits.argmax(1)]
        assert len({row["prediction"] for row in rows}) > 1
    with pytest.raises(UserError, match=r"needs the columns|-1 .*needs none|has no label|label None"):
        run_here(replace(job, predictions=""))


def test_some_labels_are_not_none(tmp_path: Path) -> None:
    model = text_model(tmp_path / "model", "rte", WORDS)
    data = write_rows(tmp_path, "rte", label=lambda i: i % 2 if i != 5 else -1)
    job = EvalJob(str(model), str(data), task="language", predictions=str(tmp_path / "out.csv"))
    with pytest.raises(UserError, match="row 5 has the label -1"):
        run_here(job)
    assert not (tmp_path / "out.csv").exists()


# What gluebenchmark.com takes for each class, in the order of the hub's labels.
SUBMITTED = {
    "cola": "01",
    "sst2": "01",
    "mrpc": "01",
    "qqp": "01",
    "wnli": "01",
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "stsb": None,
}


@pytest.mark.parametrize("name", SUBMITTED)
def test_submissions(name: str, tmp_path: Path) -> None:
    assert SUBMITTED.keys() == GLUE
    model = text_model(tmp_path / "model", name, WORDS)
    data = write_rows(tmp_path, name, label=lambda i: -1, idx=lambda i: i + 40)
    path = tmp_path / "out.tsv"
    run_here(EvalJob(str(model), str(data), batch_size=8, task="language", predictions=str(path)))
    logits, words = answered_by_hand(model, data, name), SUBMITTED[name]
    head, *lines = path.read_text().splitlines()
    assert head == "index\tprediction"
    found = [line.split("\t") for line in lines]
    assert [int(index) for index, _ in found] == [i + 40 for i in range(23)]
    if words is None:
        wanted = logits[:, 0].clamp(0, 5).tolist()
        assert [float(answer) for _, answer in found] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert logits.min() < 0 and max(wanted) > 0
    else:
        assert [answer for _, answer in found] == [words[i] for i in logits.argmax(1)]
        assert len({answer for _, answer in found}) > 1


def test_sentences_at_1_and_2_processes(rookery: Rookery, tmp_path: Path) -> None:
    model, data = text_model(tmp_path / "model", "rte", WORDS), write_rows(tmp_path, "rte", 21, index=lambda i: i)
    options = ("--nproc", 2, "--threads", 1, "--batch-size", 4, "--cache", tmp_path, "--predictions", "2.jsonl")
    done = rookery("eval", model, "--data", data, *options, "--output", "out.json")
    assert done.stderr.count("no labels") == 1 and "accuracy" not in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["count"] == 21
    run_here(EvalJob(str(model), str(data), batch_size=4, task="language", predictions=str(tmp_path / "1.jsonl")))
    one, two = ((tmp_path / f"{nproc}.jsonl").read_bytes() for nproc in (1, 2))
    assert one == two
    rows = [json.loads(line) for line in one.splitlines()]
    assert [(row["key"], row["idx"], row["label"]) for row in rows] == [(i, i, None) for i in range(21)]
    sure = answered_by_hand(model, data, "rte").softmax(1).amax(1).tolist()
    assert [row["probability"] for row in rows] == pytest.approx(sure, rel=1e-4) and max(sure) - min(sure) > 0.1


def test_a_file_of_the_website(tmp_path: Path) -> None:
    model = text_model(tmp_path / "model", "rte", WORDS)
    lines = ["index\tsentence1\tsentence2", *(f'{i}\tw{i} "not w3\tw{i % 7} not w{i % 5}' for i in range(21))]
    data, path = tmp_path / "test.tsv", tmp_path / "RTE.tsv"
    data.write_text("\n".join(lines) + "\n")
    assert run_here(EvalJob(str(model), str(data), task="language", predictions=str(path)))["count"] == 21
    words = [TASKS["rte"].classes[i] for i in answered_by_hand(model, data, "rte").argmax(1)]
    assert path.read_bytes().decode() == "index\tprediction\n" + "".join(f"{i}\t{w}\n" for i, w in enumerate(words))
    assert len(set(words)) == 2


def test_a_number_that_is_none() -> None:
    assert TASKS["stsb"].submitted(-0.5) == 0 and TASKS["stsb"].submitted(7.25) == 5
    assert math.isnan(float(TASKS["stsb"].submitted(math.nan)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--predictions", "out.txt"], "out.txt: the name says how to write --predictions; let it end in .csv, .tsv"),
        (["--predictions", "nowhere/out.csv"], "(there is no folder nowhere); choose another --predictions"),
        (["--predictions", "folder.csv"], "folder.csv: a folder; name a file for --predictions"),
        (["--predictions", "/proc/out.csv"], "/proc/out.csv: can't be written"),
        (["--output", "/proc/out.json"], "/proc/out.json: can't be written"),
        (["--predictions", "a.csv", "--calibrate", "1"], "--predictions are those of one crop ratio"),
        (["--predictions", "a.jsonl", "--output", "./a.jsonl"], "the file of --output and of --predictions"),
    ],
)
def test_mistakes(options: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are found before anything is read."""
    monkeypatch.chdir(tmp_path)
    Path("folder.csv").mkdir()
    outcome = CliRunner().invoke(app, ["nothing_is_here", *options])
    assert isinstance(outcome.exception, UserError) and told in str(outcome.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]


def test_a_generator_predicts_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"task": "generate"}))
    outcome = CliRunner().invoke(app, [str(tmp_path), "--data", "x", "--predictions", str(tmp_path / "a.csv")])
    assert isinstance(outcome.exception, UserError) and "a generator predicts nothing" in str(outcome.exception)


def test_a_full_disk_costs_the_predictions_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = text_model(tmp_path / "model", "polarity", WORDS)
    with small_disk(tmp_path / "disk", "64k") as disk:
        path = disk / "out.csv"
        path.write_text("old\n")
        job = EvalJob(str(model), "made:4000", task="language", predictions=str(path))
        with pytest.raises(UserError, match=r"out.csv can't be written: No space left"):
            run_here(job)
        assert path.read_text() == "old\n" and [file.name for file in disk.iterdir()] == ["out.csv"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["count"] == 4000
