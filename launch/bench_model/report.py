"""The table that `rookery bench model` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 160


def print_report(report: dict[str, Any]) -> None:
    """Print the table."""
    how = "compiled" if report["compile"] else "eager"
    table = Table(
        title=f"{report['precision']}, {how}; {report['device']}", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("model", no_wrap=True)
    table.add_column("")
    for column in ("batch", "images/s", "min..max", "times faster", "MFU", "GB", "1st step"):
        table.add_column(column, justify="right")
    for row in report["models"]:
        if "failed" in row:
            table.add_row(row["name"], row["phase"], str(row.get("batch", "-")), row["failed"][:60])
            continue
        rate, ratio = row["images_per_second"], row.get("times_faster")
        table.add_row(
            row["name"],
            row["phase"],
            str(row["batch"]),
            f"{rate['median']:,.1f}",
            f"{rate['min']:,.1f}..{rate['max']:,.1f}",
            "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            "-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}",
            "-" if row["first_step_seconds"] is None else f"{row['first_step_seconds']:.1f} s",
        )
    console = _console()
    console.print(table)
    than = f" than {report['against']} in the same round" if report["against"] else ""
    console.print(
        f"\nMedian of {report['repeats']} interleaved rounds on made pictures; train: forward, backward, AdamW. times "
        f"faster{than}: median of the rounds' ratios. MFU: operations of the forward pass (train: three times "
        "these) over the peak. GB: most GPU memory of the model. 1st step: with its compilation."
    )


def print_counts(report: dict[str, Any]) -> None:
    """Print the table of counts."""
    table = Table(title=f"counted, half precision, batch {report['batch']}", title_justify="left", box=None)
    table.add_column("model", no_wrap=True)
    table.add_column("")
    for column in ("params", "GFLOP/image", "MB/image", "FLOP/byte", "images/s at most, unfused: A100", "H100", "H200"):
        table.add_column(column, justify="right")
    for row in report["models"]:
        for phase in (phase for phase in ("infer", "train") if phase in row):
            counted = row[phase]
            flops, moved = counted["gflops_per_image"], counted["unfused_megabytes_per_image"]
            bounds = counted["unfused_bound_images_per_second"]
            table.add_row(
                row["name"],
                phase,
                f"{row['params'] / 1e6:.2f} M",
                f"{flops:.2f}",
                f"{moved:.1f}",
                f"{1000 * flops / moved:.0f}",
                *(f"{bounds[gpu]:,.0f}" for gpu in ("a100", "h100", "h200")),
            )
    _console().print(table)


def _console() -> Console:
    """As wide as the tables: a terminal wraps what is too long for it, where rich would cut figures off."""
    console = Console(highlight=False, emoji=False, markup=False)
    console.width = max(console.width, _WIDTH)
    return console
