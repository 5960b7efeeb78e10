"""The recipes in configs/, and data that any of them can be tried with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from pipeline.config_load import load_config
from pipeline.config_task import LanguageConfig
from pipeline.data.text.glue import TASKS

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = {
    str(path.relative_to(CONFIGS).with_suffix("")): path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if not path.name.startswith("_") and path.parent.name not in ("sweep", "ray")
}
# Everything at its full size, see `make recipes`.
WHOLE = os.environ.get("ROOKERY_WHOLE_RECIPES") == "1"
LANGUAGE = {name: path for name, path in RECIPES.items() if name.startswith("nlp/")}
GENERATE = {name: path for name, path in RECIPES.items() if name.startswith("generate/")}


def make_pictures(folder: Path, of_a_class: int) -> Path:
    """Shards `train`, with label maps, and `val` of made pictures of 32 px in four classes; returns their folder.

    Args:
        of_a_class: pictures of each class in each of the two splits.
    """
    pictures, maps = folder / "pictures", folder / "maps"
    draw = np.random.default_rng(0)
    for name in (f"{part}/{label}/{n}" for part in ("train", "val") for label in "abcd" for n in range(of_a_class)):
        picture, label_map = pictures / f"{name}.png", maps / f"{name.split('/', 1)[1]}.pt"
        for file in (picture, label_map):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(picture)
        top3 = np.argsort(draw.random((4, 6, 6)), axis=0)[:3]
        torch.save(torch.from_numpy(np.stack([draw.normal(5, 3, top3.shape), top3])).half(), label_map)
    prepare_splits(pictures, folder / "shards", PrepOptions(workers=1, token_labels=maps))
    return folder / "shards"


def make_sentences(name: str, folder: Path, count: int) -> list[str]:
    """Overrides for a recipe of LANGUAGE: made rows for its task, the words of these rows, weights from scratch."""
    task = load_config(LANGUAGE[name]).task
    assert isinstance(task, LanguageConfig)
    given = [f"data.train=made:{count}", f"data.val=made:{count}"]
    if task.name != "polarity":
        file, column = folder / f"{task.name}.jsonl", TASKS[task.name].columns[0]
        file.write_text("\n".join(json.dumps({column: f"a {i} b", "label": i % 2}) for i in range(count)))
        given = [f"data.train={file}", f"data.val={file}"]
    return [*given, f"data.cache={folder}", "task.tokenizer=null", "model.init=null", "model.init_head=keep"]
