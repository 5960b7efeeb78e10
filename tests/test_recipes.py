"""Every recipe in configs/: it resolves, its dry run says so, and it trains three steps with finite losses.

The batch is 2 and the shards hold a few made pictures of 32 px; everything else is the recipe's. The dry run has the
whole model. A model above MOST_MACS takes its steps with few of its layers (SHALLOW), of its own width and at its own
image size, since all of them would cost a CPU minutes; with ROOKERY_WHOLE_RECIPES=1 they are all there.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from launch import cli
from pipeline.config_load import load_config
from pipeline.config_task import GenerateConfig, LanguageConfig
from pipeline.data.text.glue import TASKS
from pipeline.models import model_info
from pipeline.resolve import Resolved, resolve
from pipeline.train.distributed import World
from pipeline.train.step import StepResult, seed_step

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = {
    str(path.relative_to(CONFIGS).with_suffix("")): path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if not path.name.startswith("_") and path.parent.name not in ("sweep", "ray")
}
LANGUAGE = {name: path for name, path in RECIPES.items() if name.startswith("nlp/")}
GENERATE = {name: path for name, path in RECIPES.items() if name.startswith("generate/")}
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
WHOLE = os.environ.get("ROOKERY_WHOLE_RECIPES") == "1"
# Attention maps at several times their number make Refiner far slower here than its operations say.
MOST_MACS = {"nest": 1.1e10, "hvt": 2e10, "deit": 2e10, "refiner": 7e9}
SHALLOW = {
    "nest": ["model.options.depths=1"],
    "refiner": ["model.options.depth=2", "objective.cos_pairs=1"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits `train`, with label maps, and `val`, of eight pictures in four classes."""
    folder = tmp_path_factory.mktemp("recipes")
    pictures, maps = folder / "pictures", folder / "maps"
    draw = np.random.default_rng(0)
    for name in (f"{split}/{label}/{number}" for split in ("train", "val") for label in "abcd" for number in range(2)):
        picture, label_map = pictures / f"{name}.png", maps / f"{name.split('/', 1)[1]}.pt"
        for file in (picture, label_map):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(picture)
        top3 = np.argsort(draw.random((4, 6, 6)), axis=0)[:3]
        torch.save(torch.from_numpy(np.stack([draw.normal(5, 3, top3.shape), top3])).half(), label_map)
    prepare_splits(pictures, folder / "shards", PrepOptions(workers=1, token_labels=maps))
    return folder / "shards"


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
    """The same without the hub: the task's columns from a file, the words of that file, weights from scratch."""
    path, own = LANGUAGE[name], load_config(LANGUAGE[name])
    assert isinstance(own.task, LanguageConfig)
    file, column = tmp_path / "rows.jsonl", TASKS[own.task.name].columns[0]
    file.write_text("\n".join(json.dumps({column: f"a {i} b", "label": i % 2}) for i in range(8)))
    overrides = [f"data.train={file}", f"data.val={file}", f"data.cache={tmp_path}", "task.tokenizer=null", *SMALL]
    if own.task.name == "polarity":
        overrides[:2] = ["data.train=made:8", "data.val=made:8"]
    overrides += [f"out={tmp_path}/runs", "model.init=null", "model.init_head=keep"]
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
