"""Which rooms of the house know which: the table of docs/design.md, and that no import closes a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(f for top in ("data_prep", "launch", "pipeline") for f in (ROOT / top).rglob("*.py"))

# What a room may import besides itself and the single files of pipeline/, config.py and the like.
MAY: dict[str, set[str]] = {
    "data_prep": set(),
    "launch": {"data_prep", "data", "explain", "export", "generate", "models", "tracking", "train"},
    "models": set(),
    "data": {"data_prep"},
    "tracking": {"data_prep", "models"},
    "explain": {"data_prep", "data", "models"},
    "generate": {"data", "models", "tracking"},
    "train": {"data_prep", "data", "models", "tracking", "explain", "generate"},
    "export": {"data", "models", "tracking", "train"},
    "config": {"data_prep", "data"},
}
OF_DATA_PREP = {
    "data": {"manifest", "beton", "npy", "jpeg_coding", "store", "remote", "attempts", "hashes", "compiled"},
    "tracking": {"store", "cores", "redact"},
    "explain": {"images"},
    "config": {"wording"},
}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file) for file in FILES}


def imported(tree: ast.AST, now: bool) -> Iterator[str]:
    """Modules of this project that are imported; with `now` only those that it takes to be imported itself."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue  # names for readers of types
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in whole)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif not (now and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imported(node, now)


@cache
def graph(now: bool) -> dict[str, set[str]]:
    found = {module_of(file): set(imported(ast.parse(file.read_text()), now)) for file in FILES}
    return {module: names & MODULES for module, names in found.items()}


def room(module: str) -> str:
    """The folder that a module lies in; `config` for single files of pipeline/, but for resolve.py."""
    first, _, rest = module.partition(".")
    if first != "pipeline":
        return first
    name = rest.split(".")[0]
    return name if name in MAY else "train" if name == "resolve" else "config"


@pytest.mark.parametrize("name", MAY)
def test_a_room_knows_those_below_it(name: str) -> None:
    found = {(module, other) for module, others in graph(now=False).items() if room(module) == name for other in others}
    assert found
    known = MAY[name] | {name, "config"} if name != "data_prep" else {name}
    assert not [(module, other) for module, other in found if room(other) not in known]
    parts = {other.partition(".")[2] for _, other in found if room(other) == "data_prep"} - {"", "errors"}
    assert name not in OF_DATA_PREP or parts == OF_DATA_PREP[name]


def test_no_import_closes_a_circle() -> None:
    modules = graph(now=True)
    assert len(modules) > 200 and "pipeline.train.loop" in modules["pipeline.train.worker"]
    list(TopologicalSorter({module: others - {module} for module, others in modules.items()}).static_order())
