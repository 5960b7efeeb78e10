"""The table of architectures: name -> how to build it and what its paper reports."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.models.base import ImageModel
from pipeline.models.errors import ModelError, UnknownOption


@dataclass(frozen=True)
class ModelInfo:
    """One registered architecture.

    Attributes:
        name: the name users write.
        family: "nest", "refiner", ...
        build: class or function that makes the model; its parameters are the valid overrides.
        config: the arguments of `build` that define this variant, `img_size` and `num_classes` among them.
        paper: where the architecture comes from.
        source: where `top1` is reported; empty without one.
        top1: the reported top-1 accuracy in percent; None where no citable figure is known.
        dataset: what `top1` was measured on.
    """

    name: str
    family: str
    build: Callable[..., ImageModel]
    config: Mapping[str, Any]
    paper: str
    source: str = ""
    top1: float | None = None
    dataset: str | None = None

    @property
    def img_size(self) -> int:
        """Side of the input image in pixels."""
        return self.config["img_size"]


_MODELS: dict[str, ModelInfo] = {}


def register(info: ModelInfo) -> None:
    """Add an architecture to the table. A name can be taken only once."""
    if info.name in _MODELS:
        raise ModelError(f"model {info.name!r} is registered twice")
    _MODELS[info.name] = info


def list_models(pattern: str = "*") -> list[str]:
    """Registered names that match a shell pattern, in the order of registration (family, then size)."""
    return [name for name in _MODELS if fnmatch.fnmatchcase(name, pattern)]


def model_info(name: str) -> ModelInfo:
    """The entry of `name`.

    Raises:
        ModelError: no such model; the message suggests the nearest names.
    """
    if name not in _MODELS:
        raise ModelError(f"unknown model {name!r}{suggest(name, _MODELS)}; `rookery models` lists all")
    return _MODELS[name]


def create_model(name: str, **overrides: Any) -> ImageModel:
    """Build a registered architecture with fresh weights.

    Args:
        name: one of `list_models()`.
        overrides: arguments that replace the variant's own, e.g. `num_classes=`, `img_size=`, `drop_path_rate=`; None
            means the variant's own value.

    Raises:
        ModelError: unknown name or override, or a combination the architecture can't take.
    """
    info = model_info(name)
    valid = inspect.signature(info.build).parameters
    given = {key: value for key, value in overrides.items() if value is not None}
    for key in given:
        if key not in valid:
            raise UnknownOption(
                f"model {name!r} has no option {key!r}{suggest(key, valid)}; its options are: {', '.join(valid)}"
            )
    return info.build(**{**info.config, **given})


def suggest(word: str, known: Mapping[str, Any]) -> str:
    """ ", did you mean 'this'?" for a word that is not among the known ones; empty where none is near."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f", did you mean {' or '.join(map(repr, close))}?" if close else ""
