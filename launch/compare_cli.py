"""`rookery compare`: runs side by side in the terminal, as JSON or as CSV."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from pipeline.errors import UserError
from pipeline.tracking.compare import Column, table_columns, to_csv, to_json
from pipeline.tracking.runs import find_runs, summarize

_GAP = 3


def compare(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or folders of them", metavar="RUN...")],
    as_json: Annotated[bool, typer.Option("--json", help="everything as JSON, curves included")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="one line per run as CSV")] = False,
) -> None:
    """Compare runs: the config keys that differ, progress, accuracy, speed, cost."""
    if as_json and as_csv:
        raise UserError("--json and --csv exclude each other; choose one")
    summaries = [summarize(path) for path in find_runs(runs)]
    if as_json:
        print(to_json(summaries))
    elif as_csv:
        print(to_csv(summaries), end="")
    else:
        columns = table_columns(summaries)
        best = max(range(len(summaries)), key=lambda i: summaries[i].best_top1 or 0.0)
        show(columns, Console(), best)


def show(columns: list[Column], console: Console, best: int) -> None:
    """Print the table: in pieces that fit on a terminal, as one line per run anywhere else.

    Args:
        best: the run that stands out, on a terminal.
    """
    if not console.is_terminal:
        print(plain_table(columns), end="")
        return
    for piece in fit(columns, console.width):
        table = Table(box=box.SIMPLE_HEAD)
        for column in piece:
            table.add_column(column.title, justify="right" if column.numeric else "left", overflow="fold")
        for row in range(len(columns[0].cells)):
            style = "bold" if row == best and len(columns[0].cells) > 1 else ""
            table.add_row(*(column.cells[row] for column in piece), style=style)
        console.print(table)


def fit(columns: list[Column], width: int) -> list[list[Column]]:
    """Deal the columns out to tables of at most `width` characters, each beginning with the first column."""
    first, *rest = columns
    pieces = [[first]]
    used = start = _width(first) + _GAP
    for column in rest:
        need = _width(column) + _GAP
        if used + need > width and len(pieces[-1]) > 1:
            pieces.append([first])
            used = start
        pieces[-1].append(column)
        used += need
    return pieces


def plain_table(columns: list[Column]) -> str:
    """Aligned text, one line per run however long; without curves where the output can't show them."""
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        columns = [column for column in columns if all(cell.isascii() for cell in column.cells)]
    padded = []
    for column in columns:
        width = _width(column)
        texts = [column.title, *column.cells]
        padded.append([text.rjust(width) if column.numeric else text.ljust(width) for text in texts])
    return "".join("  ".join(row).rstrip() + "\n" for row in zip(*padded, strict=True))


def _width(column: Column) -> int:
    return max(cell_len(text) for text in [column.title, *column.cells])
