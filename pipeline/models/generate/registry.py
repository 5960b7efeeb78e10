"""The table of generators: the transposed NesT, and what it is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.models.errors import ModelError, UnknownOption
from pipeline.models.generate.base import Generator
from pipeline.models.generate.conv import ConvGenerator
from pipeline.models.generate.transposed import TransposedNest
from pipeline.models.registry import suggest


@dataclass(frozen=True)
class GeneratorInfo:
    """One generator.

    Attributes:
        build: the class; its parameters are the valid overrides.
        config: the arguments that define this variant.
        source: where it comes from.
    """

    build: Callable[..., Generator]
    config: Mapping[str, Any]
    source: str


_NEST = "NesT 2105.12723; our sizes"
_PLANE = "TransGAN 2102.07074; sizes as above"
_CONV = "SAGAN 1805.08318, no attention"
_SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 2, "num_levels": 3, "latent_dim": 32}
_SMALL |= {"embed_dims": (96, 64, 32), "depths": 1, "num_heads": (6, 4, 2)}

# The convolutional ones are as wide as makes their parameters most nearly those of the transposed NesT.
GENERATORS: dict[str, GeneratorInfo] = {
    "nest_gen_64": GeneratorInfo(TransposedNest, {"img_size": 64}, _NEST),
    "plane_gen_64": GeneratorInfo(TransposedNest, {"img_size": 64, "attend": "plane"}, _PLANE),
    "conv_gen_64": GeneratorInfo(ConvGenerator, {"img_size": 64, "width": 56}, _CONV),
    # Not of a paper: small enough to train on a laptop's processor.
    "nest_gen_micro": GeneratorInfo(TransposedNest, _SMALL, _NEST),
    "plane_gen_micro": GeneratorInfo(TransposedNest, _SMALL | {"attend": "plane"}, _PLANE),
    "conv_gen_micro": GeneratorInfo(ConvGenerator, {"img_size": 32, "latent_dim": 32, "width": 17}, _CONV),
}


def list_generators() -> list[str]:
    """Names in the order of the table."""
    return list(GENERATORS)


def create_generator(name: str, **overrides: Any) -> Generator:
    """Build a generator with fresh weights.

    Args:
        name: one of `list_generators()`.
        overrides: arguments that replace the variant's own; None means the variant's own value.

    Raises:
        ModelError: unknown name or override, or a combination the generator can't take.
    """
    if name not in GENERATORS:
        raise ModelError(f"unknown generator {name!r}{suggest(name, GENERATORS)}; there are: {', '.join(GENERATORS)}")
    info = GENERATORS[name]
    valid = inspect.signature(info.build).parameters
    given = {key: value for key, value in overrides.items() if value is not None}
    for key in given:
        if key not in valid:
            raise UnknownOption(
                f"generator {name!r} has no option {key!r}{suggest(key, valid)}; its options are: {', '.join(valid)}"
            )
    return info.build(**{**info.config, **given})
