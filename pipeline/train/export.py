"""Weights as other tools read them: `model.safetensors` and a `config.json` that rebuilds the model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.models import create_model
from pipeline.train.engines import Engine

WEIGHTS = "model.safetensors"
MODEL_CONFIG = "config.json"


def save_weights(
    directory: Path, engine: Engine, config: RunConfig, classes: list[str], figures: dict[str, Any]
) -> None:
    """Write the weights that the run evaluates; collective, rank 0 writes.

    The directory appears, or replaces an earlier one, as a whole.
    """
    weights = engine.full_weights(config.eval.weights)
    if not weights:
        return
    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, part / WEIGHTS)
        described = {
            "model": config.model.name,
            "overrides": config.model.overrides(),
            "figures": figures,
            "classes": classes,
        }
        described["augment"] = config.augment.model_dump(mode="json")
        described["eval_transform"] = config.eval_transform.model_dump(mode="json")
        (part / MODEL_CONFIG).write_text(json.dumps(described, indent=1))
        for file in part.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        shutil.rmtree(directory, ignore_errors=True)
        part.rename(directory)
    except OSError as error:
        raise UserError(f"{directory}: can't be written ({error.strerror}); free space, then start again") from error


def load_weights(directory: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of an exported directory with its weights, and the content of its `config.json`.

    Raises:
        UserError: the directory holds no exported model, or its weights don't fit the model it names.
    """
    try:
        described = json.loads((directory / MODEL_CONFIG).read_text())
        weights: dict[str, torch.Tensor] = load_file(directory / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"{directory}: no exported model here ({Path(error.filename).name} is missing)") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: can't read the exported model: {error}") from error
    try:
        model = create_model(described["model"], **described["overrides"])
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: the weights don't fit the model that {MODEL_CONFIG} names: {error}") from error
    return model, described
