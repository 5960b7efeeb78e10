"""`rookery models`: the table of architectures."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def models(
    pattern: Annotated[str, typer.Argument(help="only names that match this shell pattern")] = "*",
    img_size: Annotated[
        int | None, typer.Option(min=1, help="count at this image side instead of each model's own")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the architectures: parameters, multiply-adds per image, the paper's top-1 and where it is reported."""
    rows = [_row(name, img_size) for name in _matching(pattern)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


def _matching(pattern: str) -> list[str]:
    # Imported here because torch takes seconds, which every other command and `--help` would pay.
    from pipeline.models import ModelError, list_models

    names = list_models(pattern)
    if not names:
        raise ModelError(f"no model matches {pattern!r}; `rookery models` lists all")
    return names


def _row(name: str, img_size: int | None) -> dict[str, object]:
    from pipeline.models import model_info
    from pipeline.models.facts import model_facts

    info, facts = model_info(name), model_facts(name, img_size=img_size)
    return {
        "name": name,
        "img_size": img_size or info.img_size,
        "num_classes": info.config["num_classes"],
        "params": facts.params,
        "macs": facts.macs,
        "top1": info.top1,
        "dataset": info.dataset,
        "paper": info.paper,
        "source": info.source,
    }


def _print_table(rows: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("name", no_wrap=True)
    for heading in ("size", "params M", "GMACs", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source")
    for row in rows:
        figures = f"{row['params'] / 1e6:.2f}", f"{row['macs'] / 1e9:.3f}"  # type: ignore[operator]
        top1 = f"{row['top1']} {row['dataset']}" if row["top1"] else ""
        source = ", ".join(filter(None, (str(row["paper"]), str(row["source"]))))
        table.add_row(str(row["name"]), str(row["img_size"]), *figures, top1, source)
    Console().print(table)
