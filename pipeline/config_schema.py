"""The keys of a config, for messages, listings and editors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config import RunConfig
from pipeline.durations import Duration


class KeyDescription(NamedTuple):
    """A key as a person reads it.

    Attributes:
        key: `section.key`.
        default: as a recipe would hold it; `required` without one; empty for a section that is always there.
        about: the values to choose from, and what they mean.
        is_section: the key has keys below it.
    """

    key: str
    default: str
    about: str
    is_section: bool


def config_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that a config can hold as `section.key`, sections before their keys.

    A key that several kinds of a section share comes once for each of them.
    """
    for name, info in model.model_fields.items():
        yield prefix + name, info
        for section in sections(info.annotation):
            yield from config_keys(section, f"{prefix}{name}.")


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field of this type can hold; none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections(part)]


def describe_keys() -> list[KeyDescription]:
    """Every key once, in the order of the tree."""
    described: dict[str, KeyDescription] = {}
    for key, info in config_keys():
        within = sections(info.annotation)
        about = info.description or (inspect.getdoc(within[0]) if within else "") or ""
        choices = "" if within else " | ".join(_choices(info.annotation))
        about = "; ".join(text for text in (choices, about) if text)
        described.setdefault(key, KeyDescription(key, _default(info), about, bool(within)))
    return list(described.values())


def file_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file.

    A file need not be a whole run: it may name a `base`, be one, or be completed on the command line. So nothing is
    required in it.
    """
    schema = _of_a_part(RunConfig.model_json_schema())
    base = {"description": "recipe that this one changes; a path relative to this file", "type": "string"}
    schema["properties"] = {"base": base} | schema["properties"]
    return {"title": "Rookery recipe"} | schema


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "" if sections(info.annotation) else "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple) and not isinstance(value, Duration):
        value = list(value)
    plain = str(value) if isinstance(value, Duration) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _of_a_part(node: Any) -> Any:
    if isinstance(node, list):
        return [_of_a_part(item) for item in node]
    if not isinstance(node, dict):
        return node
    part = {key: _of_a_part(value) for key, value in node.items() if key != "required" and not _is_made_up(key, value)}
    if "discriminator" in part and "oneOf" in part:  # there is a key of that name, too
        # Without the required `kind` the alternatives overlap; and a section that needs no more may be its kind alone.
        kinds = list(part.pop("discriminator")["mapping"])
        part["anyOf"] = [{"enum": kinds}, *part.pop("oneOf")]
    return part


def _is_made_up(key: str, value: Any) -> bool:
    # pydantic makes titles of the names, which say nothing new.
    return key == "title" and isinstance(value, str)
