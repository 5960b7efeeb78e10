"""What can be measured: this package's models, with or without a way to save work or memory, and timm's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.models import create_model, fold_refiners, model_info, set_lean
from pipeline.models.compiled import compile_model
from pipeline.models.refine_maps import LinearRefiner, OfficialRefiner

# The same stochastic depth for everybody: its cost does not depend on the rate, as long as there is one.
_DROP_PATH = 0.1
_TIMM = "timm:"
_WAYS = {
    "fold": "refiners folded into fewer operations; inference only",
    "checkpoint": "encoder layers recomputed in the backward pass",
    "maps": "no expanded attention maps kept for the backward pass",
    "compile": "the model compiled as one",
    "layers": "encoder layers compiled, those alike once",
    "triton": "this package's kernels: MLPs, residual sums, attention over up to 256 tokens, a released Refiner's maps",
}


@dataclass(frozen=True)
class Contender:
    """A model to measure.

    Attributes:
        name: of the row, as the user wrote it.
        side: of its pictures, pixels.
        trains: whether there is a training of it.
        build: a fresh model on the CPU, or on the device of a surrounding `torch.device`.
    """

    name: str
    side: int
    trains: bool
    build: Callable[[], nn.Module]


def contender(name: str, side: int | None) -> Contender:
    """The contender of a name: `timm:MODEL`, `MODEL`, or `MODEL+WAY` with one of `_WAYS`.

    Args:
        side: of the pictures; None: the model's own.

    Raises:
        UserError: no such model, it can't be built for this side, or can't do what follows the plus.
    """
    model, plus, way = name.partition("+")
    if plus and way not in _WAYS:
        raise UserError(f"{name}: after the plus comes one of {', '.join(_WAYS)}, and no other after that")
    if model.startswith(_TIMM):
        if plus:
            raise UserError(f"{name}: only models of this package have +{way}")
        return _timm(name, side)
    own = side or model_info(model).img_size
    found = Contender(name, own, way != "fold", lambda: _ours(model, own, way))
    with torch.device("meta"):
        found.build()
    return found


def _ours(name: str, side: int, way: str) -> nn.Module:
    if way == "triton" and model_info(name).family not in ("nest", "hvt", "refiner"):
        raise UserError(f"{name}+triton: the kernels are for NesT, HVT and Refiner")
    kernels = {"kernels": "triton"} if way == "triton" else {}
    model = create_model(name, img_size=side, drop_path_rate=_DROP_PATH, **kernels)
    if way == "checkpoint":
        model.set_grad_checkpointing()
    elif way in ("compile", "layers"):
        compile_model(model, way == "compile" or "layers")
    elif way == "maps" and not set_lean(model):
        raise UserError(f"{name}+maps: this model refines no attention maps")
    elif way == "fold":
        if not any(isinstance(m, LinearRefiner | OfficialRefiner) for m in model.modules()):
            raise UserError(f"{name}+fold: this model refines no attention maps")
        return fold_refiners(model)
    return model


def _timm(name: str, side: int | None) -> Contender:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{name}: needs the package timm: uv pip install timm") from error
    model = name.removeprefix(_TIMM)
    sizes: dict[str, Any] = {} if side is None else {"img_size": side}

    def build() -> Any:
        return timm.create_model(model, pretrained=False, drop_path_rate=_DROP_PATH, **sizes)

    try:
        # Built for real: some of timm's models read their own numbers, which tensors on the meta device don't have.
        built = build()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{name}: timm can't build it{f' at {side} px' if side else ''}: {error}") from error
    return Contender(name, side or built.pretrained_cfg["input_size"][-1], True, build)
