"""What every part of the config tree is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Section(BaseModel):
    """Base of every part of the tree: frozen, no unknown keys, no infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, values: Any) -> Any:
        """Python's True is a 1, which nobody means by `checkpoint.part_mb=true`: as a word it is refused."""
        if not isinstance(values, dict):
            return values
        numbers = {name for name in values if name in cls.model_fields and _number(cls.model_fields[name].annotation)}
        return {name: _worded(value) if name in numbers else value for name, value in values.items()}


def _worded(value: Any) -> Any:
    """With words for the flags in it."""
    if isinstance(value, list | tuple):
        return [_worded(each) for each in value]
    return str(value).lower() if isinstance(value, bool) else value


def _number(annotation: Any) -> bool:
    kinds = set(_kinds(annotation))
    return bool(kinds & {int, float}) and not kinds & {bool, Any}


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types of an annotation, and of what stands in its brackets; values of a Literal count by their type."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        yield from map(type, inner)
    elif inner:
        for each in inner:
            yield from _kinds(each)
    else:
        yield annotation


def kind_alone(value: Any) -> Any:
    """A section that needs no more than its kind may be written as that: `task=classify`."""
    return {"kind": value} if isinstance(value, str) else value


def _home(path: str) -> str:
    # The shell leaves the ~ of `data.train=~/shards` alone.
    return str(Path(path).expanduser()) if path.startswith("~/") else path


def _plain_name(name: str) -> str:
    if not re.fullmatch(_RUN_NAME, name):
        raise ValueError("a name has letters, digits, '.', '_' and '-', and starts with a letter or digit")
    return name


PlainName = Annotated[str, Field(max_length=200, json_schema_extra={"pattern": _RUN_NAME}), AfterValidator(_plain_name)]
Directory = Annotated[str, Field(min_length=1), AfterValidator(_home)]
