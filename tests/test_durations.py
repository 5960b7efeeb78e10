"""Durations: what is read, what is refused, and how many steps it makes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from pipeline.durations import Duration, Epochs, Interval


class Fields(BaseModel):
    plain: Duration = Duration(0, "ep")
    interval: Interval = Duration(1, "ep")
    epochs: Epochs | None = None


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("300ep", 300, "ep"),
        ("0.5ep", 0.5, "ep"),
        (" 1 epoch ", 1, "ep"),
        ("2epochs", 2, "ep"),
        ("1000steps", 1000, "steps"),
        ("1step", 1, "steps"),
        ("1281167samples", 1281167, "samples"),
        ("1 sample", 1, "samples"),
        ("1e6samples", 1_000_000, "samples"),
        ("1.5e-1ep", 0.15, "ep"),
        ("0ep", 0, "ep"),
    ],
)
def test_reads(text: str, value: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("300", "write a number and a unit, such as 300ep"),
        (300, "write a number and a unit"),
        ("ep", "write a number and a unit"),
        ("-1ep", "write a number and a unit"),
        ("3 weeks", "write a number and a unit"),
        ("1ep 2ep", "write a number and a unit"),
        ("", "write a number and a unit"),
        (None, "write a number and a unit"),
        (True, "write a number and a unit"),
        (["1ep"], "write a number and a unit"),
        ("nanep", "write a number and a unit"),
        ("1e999ep", "no finite duration"),
        ("0.5steps", "steps are counted in whole numbers"),
        ("1.5samples", "samples are counted in whole numbers"),
    ],
)
def test_refuses(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("2ep", 200),
        ("0.5ep", 50),
        ("0.126ep", 13),  # nearest
        ("0.004ep", 0),
        ("7steps", 7),
        ("64samples", 1),
        ("65samples", 2),  # up: 65 samples have not been seen after one step
        ("0samples", 0),
        ("6400samples", 100),
    ],
)
def test_steps(text: str, steps: int) -> None:
    assert Duration.parse(text).steps(steps_per_epoch=100, global_batch_size=64) == steps


@pytest.mark.parametrize(
    "duration",
    [
        Duration(300, "ep"),
        Duration(1 / 3, "ep"),
        Duration(1e-7, "ep"),
        Duration(2.0**53, "samples"),
        Duration(10**15, "samples"),
        Duration(1.0, "steps"),
    ],
)
def test_text_reads_back_equal(duration: Duration) -> None:
    assert Duration.parse(str(duration)) == duration
    fields = Fields(plain=duration)
    assert Fields.model_validate(fields.model_dump()) == fields
    assert Fields.model_validate_json(fields.model_dump_json()) == fields


def test_text_is_plain() -> None:
    assert [str(Duration.parse(t)) for t in ("300 epochs", "0.5ep", "1e3samples")] == ["300ep", "0.5ep", "1000samples"]


@pytest.mark.parametrize("value", [100, 0.25, "100", "0.25", "100ep", "7steps"])
def test_bare_numbers_count_epochs_where_the_field_says_so(value: Any) -> None:
    unit = "" if str(value)[-1].isalpha() else "ep"
    assert Fields(epochs=value).epochs == Duration.parse(f"{value}{unit}")
    if unit:
        with pytest.raises(ValidationError, match="write a number and a unit"):
            Fields(interval=value)


@pytest.mark.parametrize("fields", [{"interval": "0ep"}, {"epochs": 0}, {"epochs": "0steps"}])
def test_intervals_are_above_zero(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="must be longer than 0"):
        Fields(**fields)


@pytest.mark.parametrize("fields", [{"epochs": -1}, {"epochs": True}, {"epochs": float("nan")}, {"plain": -0.5}])
def test_no_duration_at_all(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="no duration"):
        Fields(**fields)


def test_json_schema_agrees_with_the_parser() -> None:
    properties = Fields.model_json_schema()["properties"]
    assert (properties["plain"]["default"], properties["interval"]["default"]) == ("0ep", "1ep")
    assert json.dumps(properties["epochs"]["anyOf"]).count('"number"') == 1
    for text in ("300ep", "0.5 epochs", "1000steps", "1e6samples"):
        assert re.search(properties["plain"]["pattern"], text) and Duration.parse(text)
    for text in ("300", "-1ep", "3weeks"):
        assert not re.search(properties["plain"]["pattern"], text)
