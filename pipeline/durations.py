"""Durations with units: `300ep`, `1000steps`, `1281167samples`.

A run counts global steps; everything a person writes as a duration is turned into steps once, when the number of steps
in an epoch is known.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import GetJsonSchemaHandler, GetPydanticSchema
from pydantic_core import CoreSchema, core_schema

_PATTERN = re.compile(r"^\s*(?P<value>\d+(?:\.\d+)?(?:e\d+)?)\s*(?P<unit>[a-z]+)\s*$")
_UNITS = {"ep": "ep", "epoch": "ep", "epochs": "ep", "step": "steps", "steps": "steps"}
_UNITS |= {"sample": "samples", "samples": "samples"}


@dataclass(frozen=True)
class Duration:
    """A length of training: `value` in `ep` (epochs), `steps` (global steps) or `samples`."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: Any) -> Duration:
        """Read `300ep`, `0.5ep`, `1000steps` or `1281167samples`.

        Raises:
            ValueError: there is no unit, or the text is no duration.
        """
        if isinstance(text, Duration):
            return text
        match = _PATTERN.match(str(text).lower())
        if match is None or match["unit"] not in _UNITS:
            raise ValueError(f"{text!r} is no duration; write a number and a unit: 300ep, 1000steps or 50000samples")
        return cls(float(match["value"]), _UNITS[match["unit"]])

    def steps(self, steps_per_epoch: int, global_batch_size: int) -> int:
        """The duration in global steps, rounded to the nearest step (samples: up)."""
        if self.unit == "ep":
            return round(self.value * steps_per_epoch)
        if self.unit == "samples":
            return math.ceil(self.value / global_batch_size)
        return round(self.value)

    def __str__(self) -> str:
        return f"{self.value:.12g}{self.unit}"


def _schema(bare_unit: str | None) -> GetPydanticSchema:
    def validate(value: Any) -> Duration:
        if bare_unit is not None and isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value}{bare_unit}"
        elif bare_unit is not None and isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            value = f"{value.strip()}{bare_unit}"
        return Duration.parse(value)

    def core(_source: Any, _handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    def json(_core: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        text = {"type": "string", "pattern": r"^\d+(\.\d+)?(ep|steps|samples)$", "examples": ["300ep", "1000steps"]}
        return text if bare_unit is None else {"anyOf": [text, {"type": "number"}]}

    return GetPydanticSchema(core, json)


DurationField = Annotated[Duration, _schema(None)]
"""A config field that takes a duration with its unit."""

EpochsField = Annotated[Duration, _schema("ep")]
"""A config field where a bare number counts epochs."""
