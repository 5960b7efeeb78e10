"""`rookery models`: the table of architectures."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from itertools import groupby
from typing import Annotated, Any

import typer

from launch.facts_cache import FactsCache
from pipeline.errors import UserError

# Of the columns left of the source, in characters; fixed, so that a family is printed as soon as it is counted.
_SIZE, _PARAMS, _MACS, _TOP1 = 4, 8, 8, 16
# Of a sample that the encoders of text are counted at.
_TOKENS = 128


def models(
    pattern: Annotated[str, typer.Argument(help="only names that match this shell pattern")] = "*",
    img_size: Annotated[
        int | None, typer.Option(min=1, help="count at this image side instead of each model's own")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    text: Annotated[bool, typer.Option("--text", help="the encoders of task=language instead, at 128 tokens")] = False,
    generators: Annotated[bool, typer.Option("--generators", help="those of task=generate instead")] = False,
) -> None:
    """List the architectures: parameters, multiply-adds per image, the paper's top-1 and where it is reported."""
    if text and generators:
        raise UserError("--text and --generators are two tables; give one of them")
    if text:
        _print_encoders(pattern, as_json)
        return
    if generators:
        _print_generators(pattern, img_size, as_json)
        return
    names = _matching(pattern)
    with FactsCache() as cache:
        rows = (_row(name, img_size, cache) for name in names)
        if as_json:
            typer.echo(json.dumps(list(rows), indent=2))
        else:
            _print_families(rows, max(map(len, names)))


def _matching(pattern: str) -> list[str]:
    # Imported here because torch takes seconds, which every other command and `--help` would pay.
    from pipeline.models import ModelError, list_models

    names = list_models(pattern)
    if not names:
        raise ModelError(f"no model matches {pattern!r}; `rookery models` lists all")
    return names


def _row(name: str, img_size: int | None, cache: FactsCache) -> dict[str, Any]:
    from pipeline.models import model_info

    info = model_info(name)
    params, macs = cache.facts(name, img_size)
    return {
        "name": name,
        "family": info.family,
        "img_size": img_size or info.img_size,
        "num_classes": info.config["num_classes"],
        "params": params,
        "macs": macs,
        "top1": info.top1,
        "dataset": info.dataset,
        "paper": info.paper,
        "source": info.source,
    }


def _print_families(rows: Iterator[dict[str, Any]], name_width: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for number, (paper, family) in enumerate(groupby(rows, key=lambda row: row["paper"])):
        table = Table(box=None, header_style="bold", show_header=number == 0, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("name", no_wrap=True, min_width=name_width)
        for heading, width in (("size", _SIZE), ("params M", _PARAMS), ("GMACs", _MACS), ("top-1", _TOP1)):
            table.add_column(heading, justify="right", no_wrap=True, min_width=width)
        table.add_column("source")
        table.add_row(f"[bold]{paper}[/]")
        for row in family:
            figures = f"{row['params'] / 1e6:.2f}", f"{row['macs'] / 1e9:.3f}"
            top1 = f"{row['top1']} {row['dataset']}" if row["top1"] else ""
            table.add_row(row["name"], str(row["img_size"]), *figures, top1, row["source"])
        console.print(table)


def _print_encoders(pattern: str, as_json: bool) -> None:
    """BERT by sizes, plain and with every layer's maps refined."""
    from pipeline.models import ModelError
    from pipeline.models.bert import bert_facts
    from pipeline.models.bert_options import SIZES

    names = fnmatch.filter(SIZES, pattern)
    if not names:
        raise ModelError(f"no encoder matches {pattern!r}; there are {', '.join(SIZES)}")
    forms: dict[str, Any] = {"plain": None, "linear": {}, "official": {"flavour": "official"}}
    rows: list[dict[str, Any]] = []
    for name in names:
        for form, refine in forms.items():
            facts = bert_facts(name, _TOKENS, refine=refine)
            rows.append({"name": name, "attention": form, "params": facts.params, "macs": facts.macs})
    _print_rows(rows, ("name", "attention"), as_json)


def _print_generators(pattern: str, img_size: int | None, as_json: bool) -> None:
    """Generators of images, without their discriminators."""
    import torch

    from pipeline.generate.bench import generator_macs
    from pipeline.models import ModelError
    from pipeline.models.facts import count_params
    from pipeline.models.generate import GENERATORS, create_generator

    names = fnmatch.filter(GENERATORS, pattern)
    if not names:
        raise ModelError(f"no generator matches {pattern!r}; there are {', '.join(GENERATORS)}")
    rows: list[dict[str, Any]] = []
    for name in names:
        with torch.device("meta"):
            generator = create_generator(name, img_size=img_size)
        row = {"name": name, "img_size": generator.img_size, "params": count_params(generator)}
        rows.append({**row, **generator_macs(generator), "source": GENERATORS[name].source})
    _print_rows(rows, ("name", "source"), as_json)


def _print_rows(rows: list[dict[str, Any]], words: tuple[str, ...], as_json: bool) -> None:
    """Args: words: the keys whose values are words; those that end in `macs` are shown in billions."""
    from rich.console import Console
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for key in rows[0]:
        heading = key.replace("macs", "GMACs").replace("_", " ")
        table.add_column(heading, justify="left" if key in words else "right", no_wrap=key == "name")
    for row in rows:
        table.add_row(*(_shown(key, value) for key, value in row.items()))
    Console().print(table)


def _shown(key: str, value: Any) -> str:
    if key.endswith("macs"):
        return f"{value / 1e9:.3f}"
    return f"{value:,}" if isinstance(value, int) else value
