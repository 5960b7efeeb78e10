"""Every recipe in configs/: it resolves, its dry run says so, and it trains three steps with finite losses.

The batch is 2 and the shards hold a few made pictures of 32 px; everything else is the recipe's. The dry run has the
whole model. A model above MOST_MACS takes its steps with few of its layers (SHALLOW), of its own width and at its own
image size, since all of them would cost a CPU minutes. Recipes that go on from another one's weights take no steps at
all: they are that one's, of larger pictures. With ROOKERY_WHOLE_RECIPES=1 everything is there.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launch import cli
from pipeline.config_load import load_config
from pipeline.config_task import GenerateConfig
from pipeline.models import model_info
from pipeline.resolve import Resolved, resolve
from pipeline.train.distributed import World
from pipeline.train.step import StepResult, seed_step
from tests.recipe_cases import GENERATE, LANGUAGE, RECIPES, WHOLE, make_pictures, make_sentences

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))

# Where and how much, not what: paths, batch and the rate that follows it, loader and precision.
SMALL = (
    "train.global_batch_size=2",
    "optim.lr_batch=null",
    "data.lanes=1",
    "data.workers=0",
    "train.precision=fp32",
    "train.compile=false",  # half a minute of compilation; tests/train/test_engines.py and test_compiled.py have it
    "tracking.mlflow=false",
)
# Attention maps at several times their number make Refiner far slower here than its operations say.
MOST_MACS = {"nest": 1.1e10, "hvt": 2e10, "deit": 2e10, "refiner": 7e9}
SHALLOW = {
    "nest": ["model.options.depths=1"],
    "refiner": ["model.options.depth=2", "objective.cos_pairs=1"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("recipes"), of_a_class=2)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in LANGUAGE | GENERATE])
def test_recipe(name: str, shards: Path, tmp_path: Path) -> None:
    path, own = RECIPES[name], load_config(RECIPES[name])
    overrides = [f"data.train={shards}/train", f"data.val={shards}/val", f"out={tmp_path}", *SMALL]
    if own.model.init is not None:
        overrides.append("model.init=null")

    said = CliRunner().invoke(cli._commands, ["train", str(path), *overrides, "--dry-run"], env={"COLUMNS": "500"})
    assert said.exit_code == 0, said.output
    assert f"{tmp_path}/{own.name}" in said.output and f"{own.model.name}, " in said.output
    assert not list(tmp_path.iterdir())

    if own.model.init is not None and not WHOLE:
        return
    run = resolve(load_config(path, overrides), 1)
    family = model_info(own.model.name).family
    if run.macs > MOST_MACS[family]:
        smaller = ["train.activation_checkpointing=true"] if WHOLE else SHALLOW[family]
        run = resolve(load_config(path, [*overrides, *smaller]), 1)
    for result in three_steps(run):
        assert ("loss_tokens" in result.parts) == own.objective.token_labels


def three_steps(run: Resolved) -> list[StepResult]:
    """By the loop's own parts; all are finite, and none is skipped."""
    engine, work = run.task.make_engine(ALONE), run.task.begin(run, ALONE)
    batches, results = work.train_batches(0), []
    for step in range(3):
        seed_step(run.config.seed, step, 0)
        result = work.step(engine, next(batches), run.schedule.lr(step))
        assert math.isfinite(result.loss.item()) and 0 < result.norm.item() < math.inf and result.skipped.item() == 0
        results.append(result)
    return results


@pytest.mark.parametrize("name", LANGUAGE)
def test_recipe_of_sentences(name: str, tmp_path: Path) -> None:
    """The same without the hub."""
    path, own = LANGUAGE[name], load_config(LANGUAGE[name])
    overrides = [*make_sentences(name, tmp_path, 8), *SMALL, f"out={tmp_path}/runs"]
    said = CliRunner().invoke(cli._commands, ["train", str(path), *overrides, "--dry-run"], env={"COLUMNS": "500"})
    assert said.exit_code == 0, said.output
    assert f"{own.model.name}, " in said.output and "tokens, 2 classes" in said.output

    three_steps(resolve(load_config(path, overrides), 1))


@pytest.mark.parametrize("name", GENERATE)
def test_recipe_of_generators(name: str, shards: Path, tmp_path: Path) -> None:
    path, own = GENERATE[name], load_config(GENERATE[name])
    assert isinstance(own.task, GenerateConfig)
    overrides = [f"data.train={shards}/train", f"data.val={shards}/val", f"out={tmp_path}", *SMALL]
    overrides.append(f"train.global_batch_size={own.task.discriminator.group or 2}")
    said = CliRunner().invoke(cli._commands, ["train", str(path), *overrides, "--dry-run"], env={"COLUMNS": "500"})
    assert said.exit_code == 0, said.output
    assert f"{own.model.name}, " in said.output and "for a generated and a real image" in said.output
    three_steps(resolve(load_config(path, overrides), 1))
