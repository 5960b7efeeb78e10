"""What is wrong with a config, in the words of its author: which file and line, which key, what to write instead."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config import RunConfig
from pipeline.config_schema import config_keys, sections
from pipeline.errors import UserError

KeyPath = tuple[str | int, ...]


class ModelMistake(UserError):
    """What a model says of its name and options, which no config knows; `config_load.placing` adds where they stand."""

    def __init__(self, message: object) -> None:
        super().__init__(f"model: {message}")

    def place(self, places: Mapping[KeyPath, str]) -> str | None:
        """Where the option was written that the message speaks of, or the options, or the model."""
        text = str(self).partition("; its options are")[0]
        told = [
            (-len(path), found.start(), place)
            for path, place in places.items()
            if path[0] in ("model", "task") and path[1:] not in ((), ("name",), ("kind",), ("options",))
            if (found := re.search(rf"\b{re.escape(str(path[-1]))}\b", text))
        ]
        if told:
            return min(told)[2]
        keys = ("name",) if "unknown model" in text else ("options", "name")
        return next((places["model", key] for key in keys if ("model", key) in places), places.get(("model",)))


# Flags of timm's train.py whose likeness to our keys shows to people only.
_TIMM = {
    "aa": "augment.rand_augment",
    "amp": "train.precision",
    "opt": "optim.name",
    "reprob": "augment.random_erasing.prob",
    "sched": "optim.schedule",
    "wd": "optim.weight_decay",
}
# How pydantic tells the type that it expected.
_KIND = "Input should be a valid "
_FLAG = ("bool_parsing", "bool_type")
_SECTION_EXPECTED = ("model_type", "dict_type", "model_attributes_type", "union_tag_not_found")


def explain(
    error: ValidationError,
    tree: dict[str, Any],
    origin: str,
    places: Mapping[KeyPath, str],
    model: type[BaseModel] = RunConfig,
) -> str:
    """One line per mistake.

    Args:
        error: what pydantic found.
        tree: the values it looked at.
        origin: where the tree comes from.
        places: where each key of the tree was written.
        model: what the tree should have been.
    """
    lines = [f"{_place(path, origin, places)}: {text}" for path, text in _mistakes(error, tree, model)]
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{origin}: {len(lines)} mistakes", *lines])


def _mistakes(error: ValidationError, tree: dict[str, Any], model: type[BaseModel]) -> list[tuple[KeyPath, str]]:
    found: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_path(detail, tree), []).append(detail)
    mistakes: list[tuple[KeyPath, str]] = []
    for path, details in found.items():
        # A value of a type with alternatives fails once for each: what was meant is the one that got furthest.
        if any(other[: len(path)] == path for other in found if len(other) > len(path)):
            continue
        meant = [detail for detail in details if detail["type"] not in _SECTION_EXPECTED] or details
        if all(detail["msg"].startswith(_KIND) for detail in meant):
            kinds = " or ".join(dict.fromkeys(detail["msg"].removeprefix(_KIND) for detail in meant))
            meant = [{**meant[0], "msg": _KIND + kinds}]
        elif {detail["type"] for detail in meant} <= {*_FLAG, "literal_error"} and len(meant) > 1:
            words = " or ".join(d["ctx"]["expected"] for d in meant if d["type"] == "literal_error")
            meant = [{**meant[0], "msg": f"Input should be true, false or {words}"}]
        mistakes += [(path, line) for detail in meant for line in _describe(detail, path, tree, model).splitlines()]
    return mistakes


def _path(detail: Any, tree: dict[str, Any]) -> KeyPath:
    """Keys from the root to the mistake; pydantic puts the names of alternatives between them."""
    path: list[str | int] = []
    node: Any = tree
    for part in detail["loc"]:
        is_key = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if is_key:
            path.append(part)
            node = node[part]
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], str):
        path.append(detail["loc"][-1])
    return tuple(path)


def _place(path: KeyPath, origin: str, places: Mapping[KeyPath, str]) -> str:
    for end in range(len(path), 0, -1):
        if path[:end] in places:
            return places[path[:end]]
    return origin


def _describe(detail: Any, path: KeyPath, tree: dict[str, Any], model: type[BaseModel]) -> str:
    key, kind = _dotted(path), detail["type"]
    value = _value_at(path, tree)
    if kind == "extra_forbidden":
        return _unknown(key, path, tree, model)
    if kind == "missing" and isinstance(detail["loc"][-1], str):
        return _missing(key, model)
    if kind in _SECTION_EXPECTED:
        return _no_section(key, value, model)
    message = detail["msg"].removeprefix("Value error, ").replace("Input should ", "should ")
    if kind == "union_tag_invalid":
        key, value = f"{key}.{detail['ctx']['discriminator'].strip(chr(39))}", detail["ctx"]["tag"]
        message = f"should be one of {detail['ctx']['expected_tags']}"
    elif kind == "missing":
        message = "too few values"
    elif kind == "tuple_type":
        message = _numbers(key, model)
    if not key:
        return message
    if isinstance(value, bool) and kind in ("int_parsing", "float_parsing"):
        message = "should be a number, not a flag"
    if value is None:
        return f"{key} is empty (null): {message}"
    return f"{key}: {message}" if isinstance(value, dict) else f"{key}={_shown(value)}: {message}"


def _numbers(key: str, model: type[BaseModel]) -> str:
    """How several numbers are written, for who knows no tuples."""
    default = next((info.default for name, info in config_keys(model) if name == key), None)
    if isinstance(default, tuple):
        return f"should be {len(default)} numbers, such as {json.dumps(default)}"
    return "should be several numbers, such as [0.5, 0.5]"


def _unknown(key: str, path: KeyPath, tree: dict[str, Any], model: type[BaseModel]) -> str:
    known = {name for name, _ in config_keys(model)}
    if key in known:
        section = _dotted(path[:-1])
        return f"{key}: not a key of {section}.kind={_value_at(path[:-1], tree).get('kind')}"
    if isinstance(_value_at(path, tree), dict):
        known = {name for name in known if _sections_of(name, model)}
    near = _nearest(key, known)
    return f"unknown key {key}; " + (
        f"did you mean {' or '.join(near)}?" if near else "`rookery config` lists every key"
    )


def _missing(key: str, model: type[BaseModel]) -> str:
    within = (field for section in _sections_of(key, model) for field in config_keys(section, f"{key}."))
    of_section = [name for name, info in within if info.is_required()]
    if of_section:
        return f"{key} is missing; it needs {' and '.join(of_section)}"
    return f"{key} is missing; add it to the config or pass {key}=VALUE"


def _no_section(key: str, value: Any, model: type[BaseModel]) -> str:
    names = list(dict.fromkeys(name for section in _sections_of(key, model) for name in section.model_fields))
    if isinstance(value, dict) and "kind" in names and "kind" not in value:
        return f"{key}.kind is missing; say which: its other keys belong to one of them"
    if value is None:
        return f"{key} is empty; leave it out or give it some of its keys: {', '.join(names)}"
    if not names:
        return f"{key}={_shown(value)}: should have keys of its own, as in {key}: {{...}}"
    if isinstance(value, str) and "name" in names:
        return f"{key}={_shown(value)}: {key} is a section; did you mean {key}.name={_shown(value)}?"
    return f"{key}={_shown(value)}: {key} is a section; its keys are {', '.join(names)}"


def _nearest(key: str, known: set[str]) -> list[str]:
    """Up to three known keys: what counts most is the last word, which may stand in another section."""
    key = key.replace("-", "_")
    section, _, word = key.rpartition(".")
    if word in _TIMM:
        return [_TIMM[word]]

    def likeness(candidate: str) -> float:
        its_section, _, its_word = candidate.rpartition(".")
        shorter, longer = sorted((word, its_word), key=len)
        is_part = len(shorter) > 2 and f"_{shorter}" in f"_{longer}"
        by_word = max(0.85 * is_part, SequenceMatcher(None, word, its_word).ratio())
        return by_word + 0.3 * SequenceMatcher(None, key, candidate).ratio() + 0.15 * (section == its_section)

    scores = {candidate: likeness(candidate) for candidate in known}
    least = max(0.95, max(scores.values()) - 0.25)
    near = [candidate for candidate, score in scores.items() if score > least]
    return sorted(near, key=lambda candidate: (-scores[candidate], candidate))[:3]


def _sections_of(key: str, model: type[BaseModel]) -> list[Any]:
    return [section for name, info in config_keys(model) if name == key for section in sections(info.annotation)]


def _value_at(path: KeyPath, tree: Any) -> Any:
    for part in path:
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:  # of a section that was written as its kind alone
            return None
    return tree


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
