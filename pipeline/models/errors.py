"""The error of this room, and the check that raises it most."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from pipeline.errors import UserError


class ModelError(UserError, ValueError):
    """A model that can't be built, or weights that don't fit it.

    A ValueError for callers in Python; the command line prints it as any UserError, without a traceback.
    """


def check_choice(option: str, value: Any, choices: Any) -> None:
    """Raise ModelError unless `value` is one of `choices`, a `Literal[...]`."""
    if value not in get_args(choices):
        raise ModelError(f"{option}={value!r} is not one of {', '.join(map(repr, get_args(choices)))}")


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
