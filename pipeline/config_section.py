"""What every part of the config tree is made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Section(BaseModel):
    """Base of every part of the tree: frozen, no unknown keys, no infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


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
