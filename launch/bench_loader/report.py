"""What `rookery bench loader` tells: figures for JSON, a table, and which knob to turn."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

# A GPU takes this much of each other's work off the loaders' hands.
_ON_GPU = "finish"


def rows(found: dict[str, list[dict[str, float]] | str], workers: int) -> list[dict[str, Any]]:
    """One entry per contender: median, minimum and maximum of its rounds, and ratios to the first contender.

    A ratio is the median of the rounds' ratios: both figures of one come from the same turn.
    """
    own = next(iter(found.values()))
    table: list[dict[str, Any]] = []
    for name, rounds in found.items():
        if isinstance(rounds, str):
            table.append({"name": name, "failed": rounds})
            continue
        rates, cpu = [turn["rate"] for turn in rounds], [turn["cpu"] for turn in rounds]
        row = {
            "name": name,
            "images_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
            "images_per_second_per_worker": statistics.median(rates) / max(workers, 1),
            "cpu_milliseconds_per_image": {
                "median": 1000 * statistics.median(cpu),
                "min": 1000 * min(cpu),
                "max": 1000 * max(cpu),
            },
        }
        if not isinstance(own, str):
            ratios = [mine["rate"] / theirs["rate"] for mine, theirs in zip(own, rounds, strict=True)]
            row["first_is_faster_by"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        table.append(row)
    return table


def advice(report: dict[str, Any]) -> Iterator[str]:
    """What to do so that the loaders keep up, most useful first."""
    spent: dict[str, float] = report["split_ms"]
    busy = sum(milliseconds for name, milliseconds in spent.items() if name != _ON_GPU)
    per_core = 1000 / busy
    target = report["target_images_per_second"]
    if target:
        cores = target / per_core
        yield (
            f"{target:,.0f} images/s need {cores:.1f} cores of this kind for a training process: "
            f"data.workers={round(cores + 0.5)}"
        )
    else:
        yield f"one core of this kind prepares {per_core:,.0f} images/s; --target RATE tells how many a GPU needs"
    largest = max((name for name in spent if name != _ON_GPU), key=lambda name: spent[name])
    share = spent[largest] / busy
    pixels = report["stored_kilobytes"]
    yield {
        "read": f"reading takes {share:.0%}: a slow disk or network; keep shards on local storage",
        "decode": f"decoding takes {share:.0%} at {pixels:.0f} KB an image: store smaller ones, "
        "`rookery prep --resize 400 --quality 90`",
        "crop": f"resizing takes {share:.0%}: augment.antialias=false and augment.interpolation=bilinear are the "
        "cheapest, where the recipe allows it",
        "augment": f"RandAugment and colour jitter take {share:.0%}: part of the recipe; more data.workers",
        "finish": "",
        "collate": f"labels and mixing partners take {share:.0%}: use fewer, longer lanes (data.lanes)",
    }[largest]


def print_report(report: dict[str, Any]) -> None:
    """Print the tables."""
    wide = None if sys.stdout.isatty() else 110  # a file has no width; this one needs no line twice
    console = Console(highlight=False, emoji=False, markup=False, soft_wrap=True, width=wide)
    table = Table(
        title=f"{report['recipe']} at {report['side']} px, {report['workers']} workers; {report['samples']:,} images "
        f"of {report['stored_kilobytes']:.0f} KB; {report['device']}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("loader")
    for column in ("images/s", "min..max", "per worker", "CPU ms/image", "first is faster by"):
        table.add_column(column, justify="right")
    for row in report["loaders"]:
        if "failed" in row:
            table.add_row(row["name"], row["failed"].splitlines()[0][:60])
            continue
        rate, cpu = row["images_per_second"], row["cpu_milliseconds_per_image"]
        ratio = row.get("first_is_faster_by")
        table.add_row(
            row["name"],
            f"{rate['median']:,.0f}",
            f"{rate['min']:,.0f}..{rate['max']:,.0f}",
            f"{row['images_per_second_per_worker']:,.0f}",
            f"{cpu['median']:.2f}",
            "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})",
        )
    console.print(table)
    if report["left_out"]:
        console.print(f"left out: {', '.join(report['left_out'])}")
    parts = ", ".join(f"{name} {spent:.2f}" for name, spent in report["split_ms"].items())
    console.print(f"\nwhere the time of rookery goes, ms per image: {parts}")
    if "wait_share" in report:
        waits, added = (_percent(report[name]) for name in ("wait_share", "added_share"))
        console.print(f"a training that is as fast waits for data {waits} of its time")
        console.print(f"{added} without what the loader's own changes of pace explain")
    for line in advice(report):
        console.print(line)


def _percent(found: dict[str, float]) -> str:
    return f"{found['median']:.1%} (quartiles {found['lower_quartile']:.1%}, {found['upper_quartile']:.1%})"
