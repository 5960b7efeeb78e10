"""What every part of the config tree is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every part of the tree: frozen, no unknown keys, no infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def kind_alone(value: Any) -> Any:
    """A section that needs no more than its kind may be written as that: `task=classify`."""
    return {"kind": value} if isinstance(value, str) else value
