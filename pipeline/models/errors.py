"""The error of this room, and the check that raises it most."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from pipeline.errors import UserError


class ModelError(UserError, ValueError):
    """A model that can't be built, or weights that don't fit it.

    A ValueError for callers in Python; the command line prints it as any UserError, without a traceback.
    """


class UnknownOption(ModelError):
    """An argument that the architecture doesn't have."""


def check_choice(option: str, value: Any, choices: Any) -> None:
    """Raise ModelError unless `value` is one of `choices`, a `Literal[...]`."""
    if value not in get_args(choices):
        raise ModelError(f"{option}={value!r} is not one of {', '.join(map(repr, get_args(choices)))}")


def check_ints(minimum: int, **values: Any) -> None:
    """Raise ModelError unless every value, named by its option, is an integer of at least `minimum`."""
    for option, value in values.items():
        if type(value) is not int or value < minimum:
            wanted = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
            raise ModelError(f"{option}={value!r} is not {wanted}")


def check_positive(**values: Any) -> None:
    """Raise ModelError unless every value, named by its option, is a finite number above 0."""
    for option, value in values.items():
        if not (_is_number(value) and 0 < value < math.inf):
            raise ModelError(f"{option}={value!r} is not a number above 0")


def check_rates(**values: Any) -> None:
    """Raise ModelError unless every value, named by its option, is a number from 0 to below 1."""
    for option, value in values.items():
        if not (_is_number(value) and 0 <= value < 1):
            raise ModelError(f"{option}={value!r} is not in [0, 1)")


def check_bools(**values: Any) -> None:
    """Raise ModelError unless every value, named by its option, is true or false."""
    for option, value in values.items():
        if not isinstance(value, bool):
            raise ModelError(f"{option}={value!r} is neither true nor false")


def check_heads(num_heads: int, dim: int, option: str) -> None:
    """Raise ModelError unless the heads divide the channels, which come from `option`."""
    if dim % num_heads:
        raise ModelError(f"{num_heads} heads don't divide {dim} channels: change num_heads or {option}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_keys(option: str, given: Any, settings: type, example: str) -> Mapping[str, Any]:
    """The mapping that a recipe gives for an option whose settings are a dataclass.

    Raises:
        ModelError: it is no mapping, or has a key that the dataclass has not.
    """
    if not isinstance(given, Mapping):
        raise ModelError(f"{option}={given!r}: give a mapping such as {example}, or null")
    known = [field.name for field in fields(settings)]
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise ModelError(f"{option} has no option {key!r}{hint}; its options are: {', '.join(known)}")
    return given
