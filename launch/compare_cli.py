"""`rookery compare`: runs side by side in the terminal, as a web page, or for other programs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from pipeline.errors import UserError
from pipeline.tracking.compare import Column, group_columns, repeats, table_columns
from pipeline.tracking.files import write_text
from pipeline.tracking.groups import group_runs
from pipeline.tracking.metric_names import lower_is_better
from pipeline.tracking.record import RunSummary, metrics_of, summarize_all
from pipeline.tracking.table_formats import to_csv, to_json, to_latex
from pipeline.wording import counted

_GAP = 3
_STDOUT = "-"
_FILE_OPTIONS = ("--html", "--json", "--csv", "--latex")


class CompareCommand(TyperCommand):
    """A command whose options for files may stand without one: the standard output is meant then."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        return super().parse_args(ctx, with_files(args))


def with_files(args: list[str]) -> list[str]:
    """Give `--json` and its like the file `-` where none follows: nothing, another option or a folder of runs."""
    filled: list[str] = []
    for arg, following in zip_longest(args, args[1:]):
        filled.append(arg)
        option_follows = following is not None and following.startswith("-") and following != _STDOUT
        if arg in _FILE_OPTIONS and (following is None or option_follows or Path(following).is_dir()):
            filled.append(_STDOUT)
    return filled


def compare(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or folders of them", metavar="RUN...")],
    html: Annotated[str | None, typer.Option(metavar="FILE", help="one page with plots, for a browser")] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="[FILE]", help="everything as JSON, evaluations included")
    ] = None,
    as_csv: Annotated[str | None, typer.Option("--csv", metavar="[FILE]", help="one line per run as CSV")] = None,
    as_latex: Annotated[
        str | None, typer.Option("--latex", metavar="[FILE]", help="a table for a paper, seeds taken together")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="what evaluations measured: top1, top5, loss, ...; default: top1, else the first")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="of a GPU-hour, in your currency: shows the cost")] = None,
) -> None:
    """Compare runs or a whole sweep: what differs, accuracy, speed, memory, cost, significance over seeds.

    A FILE of - is the standard output, and so is none.
    """
    forms: dict[str, tuple[str | None, Callable[[], str]]] = {
        "--html": (html, lambda: _page(summaries, judged, price, left_out)),
        "--json": (as_json, lambda: to_json(summaries, judged, price, left_out)),
        "--csv": (as_csv, lambda: to_csv(summaries, judged, price)),
        "--latex": (as_latex, lambda: to_latex(summaries, judged, price)),
    }
    printed = [option for option, (file, _) in forms.items() if file == _STDOUT]
    if len(printed) > 1:
        raise UserError(f"{' and '.join(printed)} exclude each other on one output; give all but one of them a file")
    if html == _STDOUT and sys.stdout.isatty():
        raise UserError("--html writes a page for a browser, not for a terminal; name its file: --html report.html")
    summaries, left_out = summarize_all(runs)
    for reason in left_out:
        typer.echo(f"left out: {reason}", err=True)
    judged = metric or next(iter(metrics_of(summaries)), "top1")
    _check_metric(summaries, judged)
    for line in (*not_judged(summaries, judged), *repeats(group_runs(summaries, judged), summaries)):
        typer.echo(line, err=True)
    for file, text in forms.values():
        if file == _STDOUT:
            # As a file would be: whatever the terminal's characters are, a page says that it is UTF-8.
            sys.stdout.flush()
            sys.stdout.buffer.write(text().encode())
        elif file is not None:
            write_text(Path(file), text())
            typer.echo(f"{file}: {counted(len(summaries), 'run')}", err=True)
    if all(file is None for file, _ in forms.values()):
        _print_tables(summaries, judged, price)


def not_judged(runs: list[RunSummary], metric: str) -> list[str]:
    """A line for the runs that were evaluated by another measure, such as sentences beside images."""
    others = [run for run in runs if metrics_of([run]) and metric not in run.evals]
    if not others:
        return []
    measures = [name for name in metrics_of(others) if name != "loss"] or ["loss"]
    names = ", ".join(run.path.name for run in others[:3]) + (", ..." if len(others) > 3 else "")
    advice = " or ".join(f"--metric {name}" for name in measures[:3])
    return [f"{counted(len(others), 'run')} of {len(runs)} didn't measure {metric} ({names}); {advice} compares those"]


def _page(runs: list[RunSummary], metric: str, price: float | None, left_out: list[str]) -> str:
    from pipeline.tracking.report.page import render

    return render(runs, metric, price, left_out)


def _check_metric(runs: list[RunSummary], metric: str) -> None:
    known = metrics_of(runs)
    if metric not in known and (known or metric != "top1"):
        measured = f"there are: {', '.join(known)}" if known else "these runs have no evaluation yet"
        raise UserError(f"no run measured --metric {metric}; {measured}")


def _print_tables(runs: list[RunSummary], metric: str, price: float | None) -> None:
    console = Console()
    sign = -1 if lower_is_better(metric) else 1
    rated = [(sign * best, -i) for i, run in enumerate(runs) if (best := run.best(metric)) is not None]
    show(table_columns(runs, metric, price), console, -max(rated)[1] if rated else 0)
    groups = group_runs(runs, metric)
    if any(len(group.members) > 1 for group in groups):
        print()
        show(group_columns(groups, metric), console, best=-1)


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
