"""Reading a config: YAML with `base:` inheritance and dotted overrides, and writing it back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import RunConfig
from pipeline.config_errors import KeyPath, ModelMistake, explain
from pipeline.errors import UserError

# Where each key was written.
Places = dict[KeyPath, str]

_MAX_DEPTH = 20
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe and apply `key.path=value` overrides (values are YAML).

    Overrides change a recipe as a recipe changes its `base:`: sections are merged key by key, anything else is
    replaced, and a section whose `kind` changes, or that is set to null before, starts anew. Without a `name` of its
    own, the run is named after the file: `configs/demo.yaml` is `demo`, `configs/nest/tiny_cifar10.yaml` is
    `nest_tiny_cifar10`. `tracking.recipe` becomes the file's path where nothing else is said.

    Raises:
        UserError: unreadable file, unknown key (with the nearest known one), a value or combination that can't be.
    """
    tree, places = read_tree(path, overrides)
    in_file = {keys[0] for keys, place in places.items() if place != "override"}
    if "recipe" in in_file and "model" not in in_file:
        raise UserError(f"{path}: this is a sweep: rookery sweep {path}; the recipe that it varies can be named here")
    tree.setdefault("name", default_name(Path(path)))
    tracking = tree.get("tracking", {})
    if isinstance(tracking, dict):
        tree["tracking"] = {"recipe": str(path)} | tracking
    return parse_tree(tree, str(path), places)


def read_tree(path: str | Path, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], Places]:
    """The plain values of a YAML file, `base:` and overrides applied, and the place of each key.

    Raises:
        UserError: unreadable file, or an override that is none.
    """
    tree, places = _read_with_base(Path(path), ())
    overriding: dict[str, Any] = {}
    for override in overrides:
        keys, value = _parse_override(override)
        overriding = _merge(overriding, _nested(keys, value))
        places = dict.fromkeys(_prefixes(keys), "override") | places | dict.fromkeys(_within(keys, value), "override")
    return _merge(tree, overriding), places


@contextmanager
def placing(path: str | Path, overrides: Iterable[str] = ()) -> Iterator[None]:
    """Say where a mistake was made that a model finds in a recipe and its overrides, as is said of all others."""
    try:
        yield
    except ModelMistake as error:
        place = error.place(read_tree(path, overrides)[1])
        raise UserError(f"{place or path}: {error}") from error


def parse_tree(tree: dict[str, Any], origin: str, places: Mapping[KeyPath, str] | None = None) -> RunConfig:
    """Validate a plain tree.

    Args:
        tree: the values.
        origin: where it comes from, for messages.
        places: where each key was written, where that is known better.

    Raises:
        UserError: the tree is no config; the message lists every mistake.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, tree, origin, places or {})) from error


def dump_config(config: RunConfig) -> str:
    """The config as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as the number it is; YAML 1.1 takes it for text."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart, which puts text that looks like such a number in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _read_with_base(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], Places]:
    if path.resolve() in chain:
        raise UserError(f"{path}: `base:` leads back to itself ({' -> '.join(p.name for p in chain)})")
    tree, places = _read_yaml(path, chain)
    base = tree.pop("base", None)
    if base is None:
        return tree, places
    if not isinstance(base, str):
        raise UserError(f"{places['base',]}: `base:` must be the path of one YAML file, relative to this one")
    inherited, base_places = _read_with_base(path.parent / base, (*chain, path.resolve()))
    # A name belongs to one recipe: two that share it would share a run directory.
    inherited.pop("name", None)
    return _merge(inherited, tree), base_places | places


def _read_yaml(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], Places]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not chain and "=" in path.name and path.suffix not in (".yaml", ".yml"):
            raise UserError(f"{path}: no such config; the recipe comes first, then key=value") from error
        asked_by = f" (named as `base:` in {chain[-1]})" if chain else ""
        raise UserError(f"{path}: no such config{asked_by}{_nearest_file(path)}") from error
    except IsADirectoryError as error:
        recipes = ", ".join(sorted(p.name for p in path.glob("[!_]*.yaml"))) or "none"
        raise UserError(f"{path}: a folder; name one of the recipes in it: {recipes}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't read this config: {error}") from error
    tree, places = _parse_yaml(text, lambda line: f"{path}:{line}")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, this file holds {type(tree).__name__}")
    return tree, places


def _nearest_file(path: Path) -> str:
    recipes = {p.name: str(p) for pattern in ("*/*.yaml", "*.yaml") for p in path.parent.glob(pattern)}
    near = [recipes[name] for name in difflib.get_close_matches(path.name, recipes, n=3, cutoff=0.7)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _parse_yaml(text: str, place: Callable[[int], str]) -> tuple[Any, Places]:
    """The value of a YAML document, and the place of each of its keys; `place` makes a place of a line number."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        places = dict(_places(node, place))
        return loader.construct_document(node), places
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        snippet = mark.get_snippet() if mark else None
        problem = f"{error.problem or error.context}{_advice(str(error.problem))}" + (f"\n{snippet}" if snippet else "")
        raise UserError(f"{place(mark.line + 1 if mark else 1)}: not valid YAML: {problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{place(1)}: not valid YAML: {error}") from error


def _advice(problem: str) -> str:
    if "cannot start any token" not in problem:
        return ""
    return "; indent with spaces" if "\\t" in problem else "; put the text in quotes"


def _places(node: yaml.Node, place: Callable[[int], str], parents: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Place of every key below a node.

    Raises:
        UserError: a key that is no plain text or stands twice (the second would silently win), or endless nesting.
    """
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{place(line)}: a key must be plain text, without brackets or braces")
        if key.tag not in _KEY_TAGS:
            raise UserError(f"{place(line)}: the key {key.value} is no text in YAML; put it in quotes")
        path = (*parents, key.value)
        if key.value in lines:
            raise UserError(
                f"{place(line)}: {'.'.join(map(str, path))} stands twice, first on line {lines[key.value]}; keep one"
            )
        if len(path) > _MAX_DEPTH:
            raise UserError(f"{place(line)}: nested too deep")
        lines[key.value] = line
        yield path, place(line)
        yield from _places(value, place, path)


class _Anew(dict[str, Any]):
    """A section that was set to null before it was filled: it takes nothing from those it is merged over."""


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy(base)
    for key, value in over.items():
        if isinstance(value, dict) and not isinstance(value, _Anew) and key in merged:
            known = merged[key]
            if known is None:
                value = _Anew(value)
            elif isinstance(known, dict) and _same_kind(known, value):
                value = _merge(known, value)
        merged[key] = value
    return merged


def _same_kind(known: dict[str, Any], value: dict[str, Any]) -> bool:
    return "kind" not in known or "kind" not in value or known["kind"] == value["kind"]


def _parse_override(override: str) -> tuple[tuple[str, ...], Any]:
    key, sign, text = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not sign or not all(keys):
        raise UserError(f"override {override!r}: write key=value, such as train.epochs=100")
    # A name such as 007 or 1e5 is meant as it is written.
    value = text if keys == ("name",) else _parse_yaml(text, lambda _: f"override {override!r}")[0]
    return keys, value


def _nested(keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _prefixes(keys: tuple[str, ...]) -> list[KeyPath]:
    return [keys[:end] for end in range(1, len(keys))]


def _within(keys: KeyPath, value: Any) -> Iterator[KeyPath]:
    """A key and, where its value is a mapping, those in it."""
    yield keys
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _within((*keys, key), inner)


def default_name(path: Path) -> str:
    """What a run is called that has no name of its own: after its file, and the folder that this is in."""
    folder = path.parent.resolve()
    parts = [folder.name, path.stem] if folder.parent.name == "configs" else [path.stem]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts)).lstrip("._-")
