"""Durations with units: `300ep`, `1000steps`, `1281167samples`.

A run counts global steps; everything a person writes as a duration is turned into steps once, when the number of steps
in an epoch is known.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

_NUMBER = r"\d+(\.\d+)?([eE][+-]?\d+)?"
_TEXT = rf"^ *({_NUMBER}) *(ep|epochs?|steps?|samples?) *$"
_UNITS = {"ep": "ep", "epoch": "ep", "step": "steps", "sample": "samples"}
_JSON_SCHEMA = {"type": "string", "pattern": _TEXT, "examples": ["300ep", "1000steps", "1281167samples"]}


class Duration(NamedTuple):
    """A length of training: `value` in `ep` (epochs), `steps` (global steps) or `samples`.

    As the type of a config field it is read from text and written back as text.
    """

    value: float
    unit: str

    @classmethod
    def parse(cls, text: Any) -> Duration:
        """Read `300ep`, `0.5ep`, `1000steps` or `1281167samples`; the units may be written out, in the singular too.

        Raises:
            ValueError: there is no unit, the text is no duration, or it cuts a step or a sample in pieces.
        """
        if isinstance(text, Duration):
            return text
        match = re.match(_TEXT, text) if isinstance(text, str) else None
        if match is None:
            raise ValueError("no duration; write a number and a unit, such as 300ep, 1000steps or 50000samples")
        value, unit = float(match[1]), _UNITS[match[4].removesuffix("s")]
        if not math.isfinite(value):
            raise ValueError("no finite duration")
        if unit != "ep" and not value.is_integer():
            raise ValueError(f"{unit} are counted in whole numbers; only epochs can be divided")
        return cls(value, unit)

    def steps(self, steps_per_epoch: int, global_batch_size: int) -> int:
        """The duration in global steps, rounded to the nearest step (samples: up)."""
        if self.unit == "ep":
            return round(self.value * steps_per_epoch)
        if self.unit == "samples":
            return math.ceil(self.value / global_batch_size)
        return int(self.value)

    def __str__(self) -> str:
        whole = int(self.value)
        return f"{whole if whole == self.value else self.value}{self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.to_string_ser_schema(when_used="always")
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, _core: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return dict(_JSON_SCHEMA)  # pydantic adds the field's default to it


def _above_zero(duration: Duration) -> Duration:
    if duration.value <= 0:
        raise ValueError("must be longer than 0")
    return duration


def _bare_number_counts_epochs(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value}ep" if is_number or (isinstance(value, str) and re.fullmatch(_NUMBER, value.strip())) else value


Interval = Annotated[Duration, AfterValidator(_above_zero)]
"""A duration above 0: how often something is done."""

Epochs = Annotated[
    Interval,
    BeforeValidator(_bare_number_counts_epochs),
    WithJsonSchema({"anyOf": [_JSON_SCHEMA, {"type": "number", "exclusiveMinimum": 0}]}),
]
"""A duration above 0 in which a bare number counts epochs."""
