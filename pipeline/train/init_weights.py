"""Starting a run from the weights of another one: `model.init`.

Position embeddings of another image size are resized (`pipeline.models.resize_pos_embed`); a head of other classes
starts anew when `model.init_head=new` asks for it. Anything else that doesn't fit is an error: weights that stay random
unnoticed cost a run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.models import ImageModel, ModelError, resize_pos_embed
from pipeline.train.export import MODEL_CONFIG, WEIGHTS, check_weights

_HEADS = ("head", "aux_head")


def load_init(model: ImageModel, config: ModelConfig) -> None:
    """Replace the weights of a freshly drawn model by those of `model.init`; with a new head, all but the head's.

    Raises:
        UserError: see `check_init`.
    """
    path = _weights_file(config)
    model.load_state_dict(_fitted(load_file(path), model, config, path), strict=config.init_head == "keep")


def check_init(model: ImageModel, config: ModelConfig, classes: Sequence[str]) -> None:
    """Make sure that `load_init` will work, from names and shapes alone; the model may be on the meta device.

    Args:
        classes: names of the run's classes; a kept head must tell the same ones apart.

    Raises:
        UserError: no such weights, weights of another model, or a head of other classes that was not asked to be new.
    """
    path = _weights_file(config)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.init={config.init}: can't read {path.name}: {error}") from error
    _fitted({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, model, config, path)
    if path.name == WEIGHTS:
        check_weights(path.parent, _described(path))
    before = _described(path).get("classes")
    if config.init_head == "keep" and before is not None and before != list(classes):
        raise UserError(
            f"model.init={config.init}: its head tells other classes apart than data.train holds; "
            "set model.init_head=new to start with a new head"
        )


def _weights_file(config: ModelConfig) -> Path:
    assert config.init is not None, "callers ask only where there is something to start from"
    path = Path(config.init)
    file = path / WEIGHTS if path.is_dir() else path
    if file.is_file():
        return file
    ends = [str(path / name) for name in ("best", "final") if (path / name / WEIGHTS).is_file()]
    advice = f"name {' or '.join(ends)}" if ends else f"name a run's final/ directory or a file such as {WEIGHTS}"
    raise UserError(f"model.init={config.init}: no weights there; {advice}")


def _fitted(
    weights: Mapping[str, torch.Tensor], model: ImageModel, config: ModelConfig, path: Path
) -> dict[str, torch.Tensor]:
    """The weights as the model needs them, without the head's where that starts anew."""
    needed = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.init_head == "new":
        weights = {name: tensor for name, tensor in weights.items() if not _in_head(name)}
        needed = {name: shape for name, shape in needed.items() if not _in_head(name)}
    try:
        fitted = resize_pos_embed(weights, model)
    except ModelError as error:
        raise UserError(f"model.init={config.init}: {error}{_trained_as(path)}") from error
    missing, extra = needed.keys() - fitted.keys(), fitted.keys() - needed.keys()
    other = {name for name in needed.keys() & fitted.keys() if needed[name] != fitted[name].shape}
    wrong = missing | extra | other
    if not wrong:
        return fitted
    if all(_in_head(name) for name in wrong):
        raise UserError(
            f"model.init={config.init}: its head doesn't fit {config.name} with {model.num_classes} classes "
            f"({_few(wrong)}); set model.init_head=new to start with a new head"
        )
    faults = {"lacks": missing, "has, and the model has not,": extra, "has in another shape": other}
    listed = "; it ".join(f"{fault} {_few(names)}" for fault, names in faults.items() if names)
    raise UserError(f"model.init={config.init}: not weights of {config.name}: it {listed}{_trained_as(path)}")


def _in_head(name: str) -> bool:
    return any(part in _HEADS for part in name.split(".")[:-1])


def _few(names: Collection[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _trained_as(path: Path) -> str:
    """What the weights are, where a `config.json` beside them says it."""
    described = _described(path)
    if not described:
        return "; set model.name and model.options to what they were trained as"
    overrides = ", ".join(f"{key}={value}" for key, value in described.get("overrides", {}).items())
    return f"; they were trained as {described.get('model')} ({overrides})"


def _described(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path.parent / MODEL_CONFIG).read_text())
    except (OSError, ValueError):
        return {}
