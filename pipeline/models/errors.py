"""The error of this room, and the check that raises it most."""

from __future__ import annotations

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
