"""What `rookery bench step` and `generate` tell: the figures as a tree for JSON, and as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import RunConfig
from pipeline.tracking.environment import device_name, key_versions
from pipeline.train.bench_step import figures


def summarise(config: RunConfig, settings: dict[str, Any], measured: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """All figures, the first count being what the others are compared with.

    Args:
        config: filled in, of any of the counts.
        settings: of the measurement.
        measured: what the workers of each count returned.
    """
    batch, steps = settings["batch_per_process"], settings["steps"]
    rows = [figures(result, count, batch, steps) for count, result in measured.items()]
    first = rows[0]["images_per_second_per_process"]["median"]
    for row in rows:
        row["efficiency"] = row["images_per_second_per_process"]["median"] / first
    return settings | {
        "scaling": "weak",
        "model": config.model.name,
        "img_size": config.model.img_size,
        "engine": config.engine.name,
        "precision": config.train.precision,
        "compile": config.train.compile,
        "accumulate": config.train.accumulate,
        "device": device_name(),
        "versions": key_versions(),
        "counts": rows,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(
        title=f"{report['model']} at {report['img_size']} px, {report['engine']}, {report['precision']}; weak scaling: "
        f"{report['batch_per_process']} samples per process; {report['device']}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    columns = ["n", "images/s", "per process", "min..max", "efficiency", "comm.", "slowest", "GB"]
    for column in columns:
        table.add_column(column, justify="right")
    for row in report["counts"]:
        rate, each = row["images_per_second"], row["images_per_second_per_process"]
        alone = row["processes"] == 1
        table.add_row(
            str(row["processes"]),
            f"{rate['median']:.1f}",
            f"{each['median']:.1f}",
            f"{each['min']:.1f}..{each['max']:.1f}",
            f"{row['efficiency']:.3f}",
            "-" if alone else f"{row['communication']['median']:.1%}",
            "-" if alone else f"rank {row['slowest_rank']} +{row['slowest_by']:.1%}",
            f"{row['memory_gb']:.2f}",
        )
    console = Console(highlight=False, emoji=False, markup=False)
    console.print(table)
    console.print(
        f"\nn processes; median of {report['repeats']} blocks of {report['steps']} steps on made batches. comm.: part "
        "of a step that the slowest process does not need by itself, same engine, measured in turn. slowest: by the "
        "steps of each process by itself, against the median. GB: peak of a process before those steps."
    )


def print_generators(report: dict[str, Any]) -> None:
    """Print the table of `rookery bench generate`."""
    rows = report["generators"]
    table = Table(
        title=f"batch {report['batch']}, {report['precision']}, {report['threads']} threads; {report['device']}",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # so that it fits into 80 columns
    )
    table.add_column("generator", no_wrap=True)
    for column in ("M", "GMACs", "attn.", "img/s", "min..max", "x MACs", "x time", "min..max"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        rate, longer = row["images_per_second"], row["times_as_long"]
        table.add_row(
            row["name"],
            f"{row['params'] / 1e6:.2f}",
            f"{row['macs'] / 1e9:.3f}",
            f"{row['attention_macs'] / row['macs']:.0%}",
            f"{rate['median']:.1f}",
            f"{rate['min']:.1f}..{rate['max']:.1f}",
            f"{row['times_the_macs']:.2f}",
            f"{longer['median']:.2f}",
            f"{longer['min']:.2f}..{longer['max']:.2f}",
        )
    console = Console(highlight=False, emoji=False, markup=False)
    console.print(table)
    console.print(
        f"\nMedian of {report['rounds']} rounds in turn. M: million parameters. MACs: multiply-adds of one; attn.: "
        f"products of queries, keys and values among them. x: of {rows[0]['name']}; times are compared within a round."
    )
