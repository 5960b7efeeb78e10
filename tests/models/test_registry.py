"""The table of models, timm's view of it, the import, and `rookery models`."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import typer
from typer.testing import CliRunner

from launch.models_cli import models
from pipeline.errors import UserError
from pipeline.models import ModelError, ModelInfo, create_model, list_models, model_info
from pipeline.models.facts import model_facts
from pipeline.models.nest import Nest
from pipeline.models.registry import register

HEAVY = ("deepspeed", "ray", "mlflow", "ffcv", "webdataset", "timm", "torchvision", "sklearn", "pyarrow")


def test_names_and_patterns():
    sizes = ["nest_tiny", "nest_small", "nest_base"]
    assert list_models("nest_*")[:3] == sizes
    assert list_models("*_cifar") == [f"{name}_cifar" for name in sizes]
    assert "nest_micro" in list_models()
    assert list_models("resnet*") == []


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("nest_tinny", {}, "unknown model 'nest_tinny', did you mean 'nest_tiny'"),
        ("zzz", {}, "unknown model 'zzz'; `rookery models` lists all"),
        (
            "nest_tiny",
            {"droppath_rate": 0.1},
            "no option 'droppath_rate', did you mean 'drop_path_rate'.* options are: img_size, in_chans, num_classes",
        ),
    ],
)
def test_typos_are_explained(name, overrides, message):
    with pytest.raises(ModelError, match=message):
        create_model(name, **overrides)


def test_errors_suit_the_command_line_and_python_callers():
    assert issubclass(ModelError, UserError)
    assert issubclass(ModelError, ValueError)


def test_a_name_is_taken_once():
    with pytest.raises(ModelError, match="'nest_tiny' is registered twice"):
        register(ModelInfo("nest_tiny", "nest", Nest, {}, "paper"))


def test_none_means_the_models_own_value():
    assert create_model("nest_micro", img_size=None, drop_path_rate=None).img_size == model_info("nest_micro").img_size


def test_import_is_light_and_timm_knows_the_models_once_it_is_imported():
    code = """
import sys, pipeline.models
sys.stderr.write("--- then timm\\n")
import timm
model = timm.create_model("rookery_nest_micro", pretrained=False, num_classes=9, drop_rate=None, pretrained_cfg=None)
assert type(model).__name__ == "Nest" and model.head.out_features == 9
assert set(timm.list_models("rookery_*")) == {"rookery_" + n for n in pipeline.models.list_models()}
try:
    timm.create_model("rookery_nest_tiny", pretrained=True)
except ValueError as error:
    assert "no weights to download" in str(error)
else:
    raise AssertionError("pretrained=True was accepted")
"""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, _, timms = done.stderr.partition("--- then timm")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ours.splitlines()}
    assert "pipeline" in imported
    assert "torch" in imported
    assert imported.isdisjoint(HEAVY)
    assert "timm.models.nest" in timms


def test_models_imported_after_timm_are_registered_at_once():
    import timm

    from pipeline.models.timm_registry import register_with_timm

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        register_with_timm()  # again, which timm notices
    assert [str(w.message).split()[1] for w in caught] == [f"rookery_{name}" for name in list_models()]
    assert timm.is_model("rookery_nest_micro")


def run(*args: str):
    app = typer.Typer()
    app.command()(models)
    return CliRunner().invoke(app, args)


def test_command_prints_the_facts():
    rows = json.loads(run("nest_tiny*", "--json").stdout)
    assert [row["name"] for row in rows] == ["nest_tiny", "nest_tiny_cifar"]
    tiny = rows[0]
    facts = model_facts("nest_tiny")
    assert (tiny["params"], tiny["macs"]) == (facts.params, facts.macs) == (17_057_608, 5_807_152_128)
    assert (tiny["top1"], tiny["dataset"], tiny["num_classes"]) == (81.5, "ImageNet-1k", 1000)
    assert "2105.12723" in tiny["paper"]


def test_command_prints_a_table():
    lines = [line.split() for line in run("nest_tiny*").stdout.splitlines()]
    assert ["nest_tiny", "224", "17.06", "5.807", "81.5", "ImageNet-1k"] in [line[:6] for line in lines]


def test_command_counts_at_another_size():
    row = json.loads(run("nest_tiny", "--img-size", "384", "--json").stdout)[0]
    assert row["img_size"] == 384
    assert row["macs"] == model_facts("nest_tiny", img_size=384).macs
    assert isinstance(run("nothing*").exception, UserError)
    assert isinstance(run("nest_tiny", "--img-size", "200").exception, UserError)
