"""`rookery models`: a table that fits a terminal of 80 columns, and counts that are kept between calls."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from itertools import groupby
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from launch import cli
from launch.models_cli import models
from pipeline.models import list_models, model_info
from pipeline.models.facts import ModelFacts
from tests.train.commands import ROOT


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path / "rookery"


def run(*args: str) -> str:
    app = typer.Typer()
    app.command()(models)
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.exception
    return done.stdout


def test_families_stand_together() -> None:
    families = [model_info(name).family for name in list_models()]
    assert [family for family, _ in groupby(families)] == list(dict.fromkeys(families))


def test_every_model_on_one_line_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.models.facts.model_facts", lambda name, img_size: ModelFacts(123_456_789, 10**11))
    lines = run().splitlines()
    assert max(map(len, lines)) <= 80
    for name in list_models():
        info = model_info(name)
        (line,) = [line.split() for line in lines if line.split()[:1] == [name]]
        assert line[1:4] == [str(info.img_size), "123.46", "100.000"]
        assert (line[4:6] == [str(info.top1), info.dataset]) == (info.top1 is not None)
    assert {info.paper for info in map(model_info, list_models())} <= {line.strip() for line in lines}


def test_counts_are_kept_and_counted_anew_when_they_must(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.loads(run("nest_micro", "--json"))
    larger = json.loads(run("nest_micro", "--img-size", "32", "--json"))
    assert larger[0]["macs"] > 3 * first[0]["macs"]

    def fail(name: str, img_size: int | None) -> ModelFacts:
        raise AssertionError(f"{name} is counted again")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.models.facts.model_facts", fail)
        assert json.loads(run("nest_micro", "--json")) == first
        assert json.loads(run("nest_micro", "--img-size", "32", "--json")) == larger
    (file,) = cache.iterdir()
    file.write_text("{ torn")
    assert json.loads(run("nest_micro", "--json")) == first


def test_a_cache_that_can_not_be_written_is_done_without(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    assert json.loads(run("nest_micro", "--json"))[0]["params"] > 0


def test_encoders_of_text() -> None:
    rows = {(row["name"], row["attention"]): row for row in json.loads(run("bert_base", "--text", "--json"))}
    assert len(rows) == 3 and rows["bert_base", "plain"]["params"] == 109_483_778
    # Attention and MLPs of 12 layers, pooler and head, at 128 tokens of 768 channels.
    layers = 12 * (12 * 768**2 * 128 + 2 * 128**2 * 768)
    assert rows["bert_base", "plain"]["macs"] == layers + 768**2 + 768 * 2
    refined = 12 * (2 * 12 * 36 + 9 * 36) * 128**2
    assert rows["bert_base", "linear"]["macs"] - rows["bert_base", "plain"]["macs"] == refined


def test_generators() -> None:
    rows = {row["name"]: row for row in json.loads(run("*_gen_64", "--generators", "--json"))}
    assert list(rows) == ["nest_gen_64", "plane_gen_64", "conv_gen_64"]
    assert rows["nest_gen_64"]["params"] == rows["plane_gen_64"]["params"] == 11_484_867
    assert rows["nest_gen_64"]["macs"] == 1_298_202_624
    assert "nest_gen_micro" in run("nest*", "--generators") and "11,484,867" in run("nest*", "--generators")


def test_version() -> None:
    done = CliRunner().invoke(cli._commands, ["--version"])
    assert (done.exit_code, done.output) == (0, f"rookery {metadata.version('rookery')}\n")


@pytest.mark.parametrize("module", ["launch.cli", "launch.slurm_job", "launch.sweep.config"])
def test_commands_start_without_torch(module: str) -> None:
    """It takes seconds to import, in which `rookery --help` would wait, and a training would not hear a signal."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert module in done.stdout.split() and not {"torch", "ray", "mlflow"} & {*done.stdout.split()}
