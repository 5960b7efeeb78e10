"""Trained models to export: reduced architectures with seeded weights that are far from their initial ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig
from pipeline.export.source import Source
from pipeline.models import create_model, model_info
from tests.models.test_every_model import SMALL

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def source(name: str, **overrides: Any) -> Source:
    """A registered model at the reduced size of `SMALL`, unless `overrides` say otherwise."""
    info = model_info(name)
    return full_source(name, **(SMALL[info.family](info) | overrides))


def full_source(name: str, **overrides: Any) -> Source:
    """A registered model at its full size, unless `overrides` say otherwise."""
    overrides = {"num_classes": len(CLASSES), "in_chans": 3} | overrides
    torch.manual_seed(0)
    model = create_model(name, **overrides).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))  # position embeddings, biases and norms are not trivial either
    described = {
        "model": name,
        "overrides": overrides,
        "figures": {"top1": 0.5},
        "classes": CLASSES,
        "augment": AugmentConfig(normalize="cifar10").model_dump(mode="json"),
        "eval_transform": EvalTransformConfig(crop_pct=0.9, interpolation="bilinear").model_dump(mode="json"),
    }
    return Source(Path(name), model, described)
