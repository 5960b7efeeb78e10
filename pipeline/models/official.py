"""Loading the weights that the authors of the papers released, by the names and layouts of their code.

Each family says in its own module which official tensors make each of our parameters; this one checks and loads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.errors import ModelError


@dataclass(frozen=True)
class Source:
    """How one entry of our state dict is made from official tensors.

    Attributes:
        shapes: names of the official tensors and their shapes, in the order `build` takes them.
        build: official tensors -> our tensor.
    """

    shapes: Mapping[str, tuple[int, ...]]
    build: Callable[..., Tensor]


@dataclass(frozen=True)
class OfficialFormat:
    """The official checkpoints of one family.

    Attributes:
        sources: model -> {name in our state dict: Source}, for every entry of the state dict.
        select: checkpoint -> the tensors of the network alone, without prefix or optimizer state.
    """

    sources: Callable[[Any], dict[str, Source]]
    select: Callable[[Mapping[str, Any]], Mapping[str, Any]]


_COUNTER = ".num_batches_tracked"
_FORMATS: dict[type[nn.Module], OfficialFormat] = {}


def register_official(model_class: type[nn.Module], official: OfficialFormat) -> None:
    """Tell `load_official` how checkpoints for `model_class` look."""
    _FORMATS[model_class] = official


def official_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `load_official` takes for this model."""
    sources = _format(model).sources(model)
    return {name: shape for source in sources.values() for name, shape in source.shapes.items()}


def load_official(model: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Set every weight of `model` from an official checkpoint.

    Args:
        model: a model of the checkpoint's size.
        tensors: official name -> array (NumPy, JAX or torch). NesT: flax paths such as
            `EncoderNDBlock_0/LayerNorm_0/scale`, with or without `optimizer/target/` before them. HVT, Refiner and
            DeiT: the names of their state dicts, or a checkpoint that holds one (the averaged weights where there are
            some).

    Raises:
        ModelError: tensors are missing, unexpected or of another shape (all are named), or the family has no official
            format. The model is then unchanged.
    """
    official = _format(model)
    arrays = {name: _tensor(value) for name, value in official.select(tensors).items()}
    wanted = official_shapes(model)
    # How many batches a BatchNorm has seen has no effect; not every copy of a checkpoint says so.
    arrays |= {name: torch.tensor(0) for name in wanted if name.endswith(_COUNTER) and name not in arrays}
    _check(wanted, {name: tuple(t.shape) for name, t in arrays.items()})
    sources = official.sources(model)
    state = {ours: source.build(*(arrays[name] for name in source.shapes)) for ours, source in sources.items()}
    model.load_state_dict(state)


def _format(model: nn.Module) -> OfficialFormat:
    for model_class, official in _FORMATS.items():
        if isinstance(model, model_class):
            return official
    raise ModelError(f"no official weight format is known for {type(model).__name__}")


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))


def _check(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    problems = {
        "missing": expected.keys() - given.keys(),
        "unexpected": given.keys() - expected.keys(),
        "wrong shape": [
            f"{name} is {given[name]}, the model needs {expected[name]}"
            for name in expected.keys() & given.keys()
            if given[name] != expected[name]
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_first(names)}" for kind, names in problems.items() if names)
        raise ModelError(f"the weights don't fit the model. {listed}")


def _first(names: Iterable[str], limit: int = 8) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
