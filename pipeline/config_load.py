"""Reading a config: YAML with `base:` inheritance, dotted overrides, errors that say which key and what to write."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import RunConfig
from pipeline.errors import UserError


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe and apply `key.path=value` overrides (values are YAML).

    Without a `name`, the run is named after the file.

    Raises:
        UserError: unreadable file, unknown key (with the nearest known one), a value or combination that can't be.
    """
    path = Path(path)
    tree = _read_with_base(path, ())
    for override in overrides:
        _apply(tree, override)
    tree.setdefault("name", path.stem)
    return parse_tree(tree, str(path))


def parse_tree(tree: dict[str, Any], origin: str) -> RunConfig:
    """Validate a plain tree; `origin` names it in errors."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_url=False)]
        raise UserError(f"{origin}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])) from error


def dump_config(config: RunConfig) -> str:
    """The config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once: the second would silently win otherwise."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_with_base(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise UserError(f"{path}: `base:` leads back to itself ({' -> '.join(p.name for p in chain)})")
    tree = _read_yaml(path, chain)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: `base:` must be the path of one YAML file, relative to this one")
    return _merge(_read_with_base(path.parent / base, (*chain, path.resolve())), tree)


def _read_yaml(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        asked_by = f" (named as `base:` in {chain[-1]})" if chain else ""
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=3)
        hint = f"; did you mean {' or '.join(str(path.parent / n) for n in near)}?" if near else ""
        raise UserError(f"{path}: no such config{asked_by}{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't read this config: {error}") from error
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, this file holds {type(tree).__name__}")
    return tree


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"{override!r}: an override is written key=value, such as train.epochs=100")
    try:
        value = yaml.load(text, _Loader) if text else None
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {error}") from error
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            child = tree[parent] = {}
        tree = child
    tree[leaf] = value


def _explain(detail: Any) -> str:
    location = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {location!r}{_did_you_mean(location)}"
    if detail["type"] == "missing":
        return f"{location} is missing; add it to the config or pass {location}=VALUE"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error" and not location:
        return message
    return f"{location}={detail['input']!r}: {message}"


def _did_you_mean(location: str) -> str:
    known = list(_known_keys(RunConfig))
    # The same last word somewhere else in the tree is the likelier slip than a spelling error.
    leaf = location.rsplit(".", 1)[-1]
    same_leaf = [key for key in known if key.rsplit(".", 1)[-1] == leaf]
    near = same_leaf or difflib.get_close_matches(location, known, n=3, cutoff=0.6)
    if not near:
        leaves = {key.rsplit(".", 1)[-1]: key for key in known}
        near = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=3, cutoff=0.7)]
    return f"; did you mean {' or '.join(near)}?" if near else "; `rookery config` lists every key"


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield prefix + name
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _known_keys(part, f"{prefix}{name}.")
