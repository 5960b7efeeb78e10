"""Every number of a recipe is the official code's, written here once more: a slip in configs/ would train all the same.

Origins, and what differs from the official runs on purpose: docs/recipes.md, docs/augmentation.md.
"""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config_load import load_config
from pipeline.models import model_info
from tests.recipe_cases import RECIPES

Values = dict[str, Any]

# What all four papers have: AdamW, DeiT's mixing, two operations of RandAugment at 9 +- 0.5, erasing; no clipping.
COMMON: Values = {
    "optim.name": "adamw",
    "optim.layer_decay": 1.0,
    "optim.betas": [0.9, 0.999],
    "optim.eps": 1e-8,
    "augment.resize": None,
    "augment.affine": None,
    "augment.hflip": 0.5,
    "augment.rand_augment.layers": 2,
    "augment.rand_augment.magnitude": 9,
    "augment.rand_augment.std": 0.5,
    "augment.rand_augment.prob": 0.5,
    "augment.random_erasing.prob": 0.25,
    "augment.random_erasing.min_area": 0.02,
    "augment.random_erasing.max_area": 1 / 3,
    "augment.random_erasing.min_aspect": 0.3,
    "augment.random_erasing.mode": "pixel",
    "mix.mixup_alpha": 0.8,
    "mix.cutmix_alpha": 1.0,
    "mix.prob": 1.0,
    "mix.switch_prob": 0.5,
    "mix.label_smoothing": 0.1,
    "train.clip_grad_norm": None,
    "model.options": {},  # no dropout, nothing of the ablations
    "model.in_chans": 3,
}

NEST: Values = COMMON | {
    "optim.lr": 2.5e-4,
    "optim.lr_batch": 256,
    "optim.weight_decay": 0.05,
    "optim.decay": "all",  # biases and LayerNorms too
    "optim.schedule.by": "step",
    "optim.schedule.cosine": "after_warmup",
    "optim.schedule.warmup_lr": 0,
    "optim.schedule.min_lr": 0,
    "optim.schedule.delay": "0ep",
    "optim.schedule.cooldown": "0ep",
    "augment.rand_augment.policy": "nest",
    "augment.random_erasing.placement": "clipped",
    "augment.crop_last": False,
    "mix.mode": "sample",
    "mix.beta": "nest_approx",
    "train.epochs": "300ep",
    "train.precision": "bf16",
    "train.ema_decay": None,
    "eval.weights": "model",
    "data.repeats": 1,
    "objective.cos_weight": 0,
    "objective.token_labels": False,
}
NEST_IMAGENET: Values = NEST | {
    "augment.crop.kind": "rrc",
    "augment.crop.scale": [0.05, 1],
    "augment.crop.ratio": [0.75, 1.33],
    "augment.crop.sampler": "side",
    "augment.interpolation": "bilinear",
    "augment.antialias": False,
    "augment.color_jitter.strength": 0.3,
    "augment.color_jitter.prob": 0.8,
    "augment.color_jitter.gray_prob": 0.2,
    "augment.normalize": "imagenet",
    "eval_transform.resize": "crop_pct",
    "eval_transform.crop_pct": 0.875,
    "eval_transform.interpolation": "bilinear",
    "eval_transform.antialias": False,
    "optim.schedule.warmup": "20ep",
    "train.global_batch_size": 1024,
    "eval.every": "10ep",
    "img_size": 224,
    "peak_lr": 1e-3,
}
NEST_CIFAR: Values = NEST | {
    "augment.crop.kind": "pad",
    "augment.crop.padding": 2,
    "augment.crop.fill": "zero",
    "augment.color_jitter": None,
    "eval_transform.resize": "none",
    "optim.schedule.warmup": "5ep",
    "eval.every": "5ep",
    "img_size": 32,
    "drop_path_rate": 0.1,
    "data.shuffle": "full",
}

DEIT: Values = COMMON | {
    "optim.lr": 5e-4,
    "optim.lr_batch": 512,
    "optim.weight_decay": 0.05,
    "optim.decay": "matrices",
    "optim.schedule.by": "epoch",
    "optim.schedule.cosine": "from_start",
    "optim.schedule.warmup": "5ep",
    "optim.schedule.warmup_lr": 1e-6,
    "optim.schedule.min_lr": 1e-5,
    "optim.schedule.delay": "1ep",
    "optim.schedule.cooldown": "0ep",  # of the 10 epochs none is run
    "augment.crop.kind": "rrc",
    "augment.crop.scale": [0.08, 1],
    "augment.crop.ratio": [3 / 4, 4 / 3],
    "augment.crop.sampler": "area",
    "augment.interpolation": "bicubic",
    "augment.antialias": True,
    "augment.rand_augment.policy": "timm-inc",
    "augment.random_erasing.placement": "inside",
    "augment.color_jitter": None,  # 0.4 there, without effect beside RandAugment
    "augment.crop_last": False,
    "augment.normalize": "imagenet",
    "eval_transform.resize": "crop_pct",
    "eval_transform.crop_pct": 0.875,
    "eval_transform.interpolation": "bicubic",
    "eval_transform.antialias": True,
    "mix.mode": "batch",
    "mix.beta": "exact",
    "train.epochs": "300ep",
    "train.global_batch_size": 1024,
    "train.precision": "bf16",
    "train.ema_decay": 0.99996,
    "eval.every": "1ep",
    "eval.weights": "model",
    "data.repeats": 3,
    "objective.cos_weight": 0,
    "objective.token_labels": False,
    "img_size": 224,
    "drop_path_rate": 0.1,
    "peak_lr": 1e-3,
}
HVT: Values = DEIT | {"optim.weight_decay": 0.025, "train.ema_decay": None}

REFINER: Values = DEIT | {
    "optim.lr_batch": None,
    "optim.schedule.delay": "0ep",
    "optim.schedule.cooldown": "10ep",
    "augment.interpolation": "random",
    "augment.normalize": "half",
    "train.epochs": "310ep",
    "train.global_batch_size": 512,
    "train.precision": "fp16",
    "eval.weights": "ema",
    "data.repeats": 1,
    "data.lanes": 16,
    "objective.cos_weight": 0.1,
    "objective.cos_pairs": 2,
    "objective.mix_token": False,
    "model.options": {"aux_head": False},
    "peak_lr": 5e-4,
}
REFINER_LABELS: Values = REFINER | {
    "augment.crop_last": True,
    "objective.token_labels": True,
    "objective.mix_token": True,
    "objective.cls_weight": 1.0,
    "objective.dense_weight": 0.5,
    "objective.cos_pairs": 12,
    "objective.official_roi_order": False,
    "model.options": {},
}
# TokenLabeling's for LV-ViT-S at 384 px: a constant rate.
REFINER_FINETUNE: Values = REFINER_LABELS | {
    "optim.lr": 5e-6,
    "optim.weight_decay": 1e-8,
    "optim.schedule.warmup": "0ep",
    "optim.schedule.warmup_lr": 0,
    "optim.schedule.min_lr": 5e-6,
    "optim.schedule.cooldown": "0ep",
    "objective.mix_token": False,
    "objective.cos_weight": 0,
    "train.epochs": "30ep",
    "train.ema_decay": None,
    "eval.weights": "model",
    "drop_path_rate": 0.1,
    "img_size": 384,
    "peak_lr": 5e-6,
}
CROP_PCT = {"s": 0.9, "m": 1.0, "l": 1.13}


def refiner(values: Values, size: str, **changes: Any) -> Values:
    return values | {"model.name": f"refiner_vit_{size}", "eval_transform.crop_pct": CROP_PCT[size]} | changes


def named(values: Values, model: str, **changes: Any) -> Values:
    return values | {"model.name": model} | changes


TABLE: dict[str, Values] = {
    "nest/tiny_imagenet": named(NEST_IMAGENET, "nest_tiny", drop_path_rate=0.2),
    "nest/small_imagenet": named(NEST_IMAGENET, "nest_small", drop_path_rate=0.3),
    "nest/base_imagenet": named(NEST_IMAGENET, "nest_base", drop_path_rate=0.5),
    "nest/base_imagenet_100ep": named(NEST_IMAGENET, "nest_base", drop_path_rate=0.5, **{"train.epochs": "100ep"}),
    **{
        f"nest/{size}_{data}": named(
            NEST_CIFAR,
            f"nest_{size}_cifar",
            peak_lr=rate,
            **{"train.global_batch_size": batch, "augment.normalize": data},
        )
        for size, batch, rate in (("tiny", 192, 1.875e-4), ("small", 128, 1.25e-4), ("base", 64, 6.25e-5))
        for data in ("cifar10", "cifar100")
    },
    **{f"deit/{size}_imagenet": named(DEIT, f"deit_{size}") for size in ("tiny", "small", "base")},
    **{f"hvt/{name}_imagenet": named(HVT, f"hvt_{name}") for name in ("ti_1", "s_0", "s_1", "s_2", "s_3", "s_4")},
    "hvt/scale_ti_4_imagenet": named(HVT, "hvt_ti_4", **{"model.options": {"num_heads": 6}}),
    **{
        f"hvt/{recipe}": named(HVT, model, peak_lr=rate, **{"train.global_batch_size": batch, "data.shuffle": "full"})
        for recipe, model, batch, rate in (
            ("s_1_cifar100", "hvt_s_1", 256, 2.5e-4),
            ("s_1_cifar100_b128", "hvt_s_1", 128, 1.25e-4),
            ("s_1_cifar100_b1024", "hvt_s_1", 1024, 1e-3),
            ("ti_1_cifar100", "hvt_ti_1", 256, 2.5e-4),
        )
    },
    **{
        f"refiner/{size}_imagenet": refiner(REFINER, size, drop_path_rate=rate)
        for size, rate in (("s", 0.1), ("m", 0.2), ("l", 0.2))
    },
    **{
        f"refiner/{size}_imagenet_token_labels": refiner(REFINER_LABELS, size, drop_path_rate=rate)
        for size, rate in (("s", 0.2), ("m", 0.25), ("l", 0.25))
    },
    **{f"refiner/{size}_imagenet_384": refiner(REFINER_FINETUNE, size) for size in "sml"},
    "refiner/l_imagenet_448": refiner(REFINER_FINETUNE, "l", img_size=448),
}
MEAN_STD = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
OF_NO_PAPER = {"nest/micro_cifar10", "nest/tiny_cifar10_fast"}
# Whose keys must all stand in the table, so that what a recipe adds is noticed.
WHOLE = ("optim.", "augment.", "mix.", "model.options")
# Without effect on pictures that are only padded and cut.
IDLE = {"augment.interpolation", "augment.antialias"}


def flat(tree: dict[str, Any], prefix: str = "") -> Values:
    """Dotted keys; `model.options` stays a mapping."""
    found: Values = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key != "options":
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def values_of(name: str) -> Values:
    """A recipe as it is read, with what its model brings and its peak learning rate."""
    config = load_config(RECIPES[name])
    model, own = config.model, model_info(config.model.name).config
    return flat(config.model_dump(mode="json")) | {
        "drop_path_rate": own["drop_path_rate"] if model.drop_path_rate is None else model.drop_path_rate,
        "img_size": model.img_size or own["img_size"],
        "peak_lr": config.optim.peak_lr(config.train.global_batch_size),
    }


@pytest.mark.parametrize("name", TABLE)
def test_recipe_has_the_published_values(name: str) -> None:
    found, wanted = values_of(name), dict(TABLE[name])
    assert found["peak_lr"] == pytest.approx(wanted.pop("peak_lr"), rel=1e-12)
    assert {key: found[key] for key in wanted} == wanted
    assert load_config(RECIPES[name]).augment.mean_std(3) == MEAN_STD[wanted["augment.normalize"]]
    read, stated = ({key for key in values if key.startswith(WHOLE)} for values in (found, wanted))
    assert read - stated == (IDLE if wanted["augment.crop.kind"] == "pad" else set())


def test_no_recipe_of_a_paper_is_left_out() -> None:
    papers = {name for name in RECIPES if name.split("/")[0] in ("nest", "refiner", "hvt", "deit")}
    assert TABLE.keys() == papers - OF_NO_PAPER
