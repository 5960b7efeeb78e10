"""The augmentation part of the config tree: what it accepts, what it refuses, and that the documented recipes load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig, MixConfig, PadCrop, RandomResizedCrop
from pipeline.data.augment.transforms import build_eval_transform, build_train_transform
from pipeline.errors import UserError

DOCS = Path(__file__).parents[2] / "docs" / "augmentation.md"


def documented_recipes() -> dict[str, dict[str, Any]]:
    """The YAML blocks of docs/augmentation.md by the name in their first line, `# name, img_size`."""
    blocks = re.findall(r"```yaml\n# (\S+), (\d+) px\n(.*?)```", DOCS.read_text(), re.S)
    return {name: {"img_size": int(size)} | yaml.safe_load(text) for name, size, text in blocks}


RECIPES = documented_recipes()


def test_the_documentation_has_all_recipes() -> None:
    assert list(RECIPES) == ["nest-imagenet", "nest-cifar", "hvt-deit", "refiner", "digits"]


@pytest.mark.parametrize("name", RECIPES)
def test_documented_recipe_builds_and_survives_a_round_trip(name: str) -> None:
    recipe = RECIPES[name]
    augment = AugmentConfig.model_validate(recipe["augment"])
    evaluation = EvalTransformConfig.model_validate(recipe["eval_transform"])
    mix = MixConfig.model_validate(recipe["mix"])
    assert set(recipe) == {"img_size", "augment", "eval_transform", "mix"}
    for model in (augment, evaluation, mix):
        assert type(model).model_validate(yaml.safe_load(yaml.safe_dump(model.model_dump(mode="json")))) == model
    build_train_transform(augment, recipe["img_size"])
    build_eval_transform(evaluation, augment, recipe["img_size"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("pad", PadCrop()),
        ({"kind": "pad", "padding": 2}, PadCrop(padding=2)),
        ({"scale": [0.05, 1.0]}, RandomResizedCrop(scale=(0.05, 1.0))),
    ],
)
def test_short_forms_of_crop(given: Any, expected: BaseModel) -> None:
    assert AugmentConfig.model_validate({"crop": given}).crop == expected


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (AugmentConfig, {"hfilp": 0.5}, "hfilp"),
        (AugmentConfig, {"hflip": 1.5}, "less than or equal to 1"),
        (AugmentConfig, {"crop": "corner"}, "'rrc', 'pad', 'center', 'none'"),
        (AugmentConfig, {"crop": {"kind": "pad", "scale": [0.1, 1]}}, "crop.pad.scale"),
        (AugmentConfig, {"crop": {"scale": [0.5, 0.2]}}, "scale must be"),
        (AugmentConfig, {"crop": {"scale": [0.5, 1.2]}}, "at most 1"),
        (AugmentConfig, {"crop": {"ratio": [0, 1]}}, "ratio must be"),
        (AugmentConfig, {"antialias": False}, "needs interpolation: bilinear"),
        (AugmentConfig, {"rand_augment": {"policy": "auto"}}, "rand_augment.policy"),
        (AugmentConfig, {"rand_augment": {"magnitude": 11}}, "rand_augment.magnitude"),
        (AugmentConfig, {"random_erasing": {"min_area": 0.5, "max_area": 0.1}}, "above max_area"),
        (AugmentConfig, {"normalize": {"mean": [0.5], "std": [0.5, 0.5]}}, "one number per channel"),
        (AugmentConfig, {"normalize": {"mean": [0.5], "std": [0]}}, "std above 0"),
        (AugmentConfig, {"affine": {"scale": [1.2, 0.8]}}, "scale must be"),
        (EvalTransformConfig, {"antialias": False}, "needs interpolation: bilinear"),
        (EvalTransformConfig, {"antialias": False, "interpolation": "bilinear", "crop_pct": 1.1}, "antialias: true"),
        (MixConfig, {"beta": "nest_approx"}, "needs mode: sample"),
        (MixConfig, {"label_smoothing": 1.0}, "less than 1"),
    ],
)
def test_refusals_name_the_key(model: type[BaseModel], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        model.model_validate(values)


def test_normalisation_must_have_the_models_channels() -> None:
    assert AugmentConfig(normalize="half").mean_std(1) == ((0.5,), (0.5,))
    with pytest.raises(UserError, match="3 channels but the model takes 1"):
        AugmentConfig(normalize="imagenet").mean_std(1)


@pytest.mark.parametrize(
    ("values", "active"),
    [
        ({}, False),
        ({"label_smoothing": 0.1}, False),
        ({"mixup_alpha": 0.8}, True),
        ({"cutmix_alpha": 1.0}, True),
        ({"mixup_alpha": 0.8, "prob": 0.0}, False),
    ],
)
def test_active(values: dict[str, float], active: bool) -> None:
    assert MixConfig(**values).active is active
