"""`rookery export` on a real run: where weights are found, what is refused, exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from launch.cli import app
from pipeline.train.export import load_weights
from pipeline.train.trained import Trained
from tests.train.commands import run_command
from tests.train.conftest import write_recipe

Export = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps, evaluated at steps 4 and 8, with checkpoints, `best` and `final`; only to be read."""
    folder = tmp_path_factory.mktemp("trained")
    prepare_splits("digits", folder / "digits", PrepOptions(workers=1))
    short = ("train.epochs=8steps", "eval.every=4steps", "checkpoint.every=4steps")
    run_command(folder, "train", write_recipe(folder / "digits", folder), *short)
    return folder / "runs" / "run"


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    """The command: arguments -> exit status, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rookery", "export", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            app()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


@pytest.mark.parametrize(
    ("place", "weights", "expected"),
    [
        ("", [], "final"),
        ("", ["--weights", "best"], "best"),
        ("", ["--weights", "last"], "checkpoints/step-00000008"),
        ("best", [], "best"),
        ("checkpoints/step-00000008", [], "checkpoints/step-00000008"),
    ],
)
def test_weights_are_found(
    place: str, weights: list[str], expected: str, run: Path, export: Export, tmp_path: Path
) -> None:
    status, out, err = export(run / place, tmp_path / "out", *weights)
    assert status == 0, err
    assert f"loaded nest_micro from {run / expected}\n" in out
    model, described = load_weights(tmp_path / "out")
    assert described["classes"] == [str(digit) for digit in range(10)]
    final, of_final = load_weights(run / "final")
    if expected != "best":  # the last checkpoint is of the last step
        state = final.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert described["overrides"] == of_final["overrides"]


def test_another_size_can_be_evaluated(run: Path, export: Export, tmp_path: Path) -> None:
    status, out, err = export(run, tmp_path / "out", "--img-size", 32)
    assert status == 0, err
    assert str(tmp_path / "out") in out
    own, other = Trained.from_export(run / "final"), Trained.from_export(tmp_path / "out")
    assert (own.img_size, other.img_size) == (16, 32)
    assert (other.classes, other.transform, other.augment) == (own.classes, own.transform, own.augment)


CASES = {
    "no such path": (["{tmp}/nowhere", "{out}"], "nowhere: no model here; name a run directory (config.yaml)"),
    "out exists": (["{run}", "{tmp}"], "exists; name a directory that doesn't"),
    "out is a file name": (["{run}", "{out}.onnx", "--format", "onnx"], "writes a directory of files"),
    "batch of another format": (["{run}", "{out}", "--batch", "4"], "belong to --format onnx, not to safetensors"),
    "opset of another format": (["{run}", "{out}", "--opset", "20"], "belong to --format onnx, not to safetensors"),
    "batch 0": (["{run}", "{out}", "--format", "onnx", "--batch", "0"], "--batch 0: give a number of at least 1"),
    "batch in words": (["{run}", "{out}", "--format", "onnx", "--batch", "two"], "--batch two: give a number"),
    "opset": (["{run}", "{out}", "--format", "onnx", "--opset", "9"], "--opset 9: choose one from 18 to 25"),
    "size": (["{run}", "{out}", "--img-size", "18"], "img_size=18 can't be cut into blocks"),
    "parent is a file": (["{run}", "{run}/config.yaml/out"], "can't be written"),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_explained(case: str, run: Path, export: Export, tmp_path: Path) -> None:
    arguments, expected = CASES[case]
    out = tmp_path / "out"
    status, _, err = export(*(a.format(run=run, out=out, tmp=tmp_path) for a in arguments))
    assert status == 2
    assert expected in err
    assert not list(tmp_path.iterdir())


def test_weights_that_a_run_lacks(run: Path, export: Export, tmp_path: Path) -> None:
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    status, _, err = export(tmp_path / "young", tmp_path / "out")
    assert status == 2
    assert "no last weights; train the run first" in err
    damaged = tmp_path / "young" / "checkpoints" / "step-00000007"
    damaged.mkdir(parents=True)
    status, _, err = export(tmp_path / "young", tmp_path / "out")
    assert status == 2
    assert f"no last weights; none of its checkpoints is whole (the newest, {damaged}: commit.json is missing)" in err
    assert "; restore its files from a copy, or train the run again, which begins anew" in err
    (tmp_path / "young" / "best").symlink_to(run / "best")
    status, _, err = export(tmp_path / "young", tmp_path / "out", "--weights", "final")
    assert status == 2
    assert "no final weights; the run has best, choose with --weights best" in err


@pytest.mark.parametrize(
    ("task", "told"), [("language", "transformers reads the directory as it is"), ("generate", "`rookery generate`")]
)
def test_weights_of_other_tasks_have_their_own_uses(task: str, told: str, export: Export, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"task": task}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    status, _, err = export(tmp_path, tmp_path / "out")
    assert status == 2 and f"weights of task={task}; this works on picture classifiers" in err and told in err


def test_a_failed_check_exits_1(run: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.export.check.TOLERANCE", -1.0)
    status, _, err = export(run, tmp_path / "out")
    assert status == 1
    assert "differs from the model by 0.00e+00 of the largest logit" in err
    assert not list(tmp_path.iterdir())
