"""docs/papers.md and the heads of the recipes: files, tests and counts that they state are there, options too."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.config_load import load_config
from pipeline.models import ImageModel, create_model
from pipeline.models.bert import Bert
from pipeline.models.bert_options import BertOptions
from pipeline.models.facts import count_macs, count_params, model_facts
from pipeline.resolve import build_model
from pipeline.train.tasks import make_task
from tests.recipe_cases import RECIPES
from tests.test_readme import printed

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "papers.md").read_text()
FILE = re.compile(r"`((?:tests|configs|models|explain|train)/[\w/]+\.(?:py|yaml))`")
ROW = re.compile(r"\| `(\w+)` \| ([\d,]+) \| ([\d.]+) (?=\|)")
TEST = re.compile(r"`(test_\w+)` in `([\w/]+\.py)`")
CLASSES = {"cifar10": 10, "cifar100": 100}


def test_files_and_tests_exist() -> None:
    files = set(FILE.findall(PAGE))
    assert len(files) > 30
    assert not [f for f in files if not (ROOT / f).exists() and not (ROOT / "pipeline" / f).exists()]
    for name, file in TEST.findall(PAGE):
        assert f"def {name}(" in (ROOT / file).read_text()


@pytest.mark.parametrize(("name", "params", "gmacs"), ROW.findall(PAGE))
def test_counts_of_the_table(name: str, params: str, gmacs: str) -> None:
    facts = model_facts(name)
    assert (f"{facts.params:,}", f"{facts.macs / 1e9:.3f}") == (params, gmacs)


def test_the_table_was_read() -> None:
    assert len(ROW.findall(PAGE)) == 18


@pytest.mark.parametrize("line", [line for page, line in printed() if page == "papers.md" and " train " in line])
def test_models_of_the_commands_can_be_built(line: str) -> None:
    recipe, *words = shlex.split(line)[2:]
    config = load_config(ROOT / recipe, [word for word in words if re.match(r"[a-z_.0-9]+=", word)])
    if config.task.kind == "classify":
        build_model(config, "meta")
    else:
        counted_model(recipe, config)


@pytest.mark.parametrize("name", RECIPES)
def test_head_of_a_recipe_counts_its_model(name: str) -> None:
    text, config = RECIPES[name].read_text(), load_config(RECIPES[name])
    model = counted_model(name, config)
    stated = re.findall(r"([\d,]+) parameters", text)
    assert stated == [f"{count_params(model):,}"] or name in ("demo", "nlp/demo")  # their data decide
    for gmacs, images, epochs, total in re.findall(
        r"([\d.]+) GMACs x 6 x ([\d,]+) images x (\d+) epochs = ([\d.]+) EFLOP", text
    ):
        assert isinstance(model, ImageModel)
        macs = count_macs(model)
        assert gmacs == f"{macs / 1e9:.3f}" and str(config.train.epochs) == f"{epochs}ep"
        last_digit = 10.0 ** -len(total.partition(".")[2])
        assert float(total) == pytest.approx(
            6e-18 * macs * int(images.replace(",", "")) * int(epochs), abs=0.51 * last_digit
        )


def counted_model(name: str, config: RunConfig) -> torch.nn.Module:
    data = next((data for data in CLASSES if data in re.split(r"[/_]", name)), None)
    with torch.device("meta"):
        if config.task.kind == "generate":
            return make_task(config).build_model("meta")
        if config.task.kind == "language":  # a resolved one would fetch the tokenizer
            return Bert(BertOptions.of(config.model.name, config.model.options))
        return create_model(config.model.name, **config.model.overrides() | {"num_classes": CLASSES.get(data, 1000)})
