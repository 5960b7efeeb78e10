"""`rookery train --dry-run`: what every process of a run would hold, read and take, as a table."""

from __future__ import annotations

from dataclasses import fields

from rich.console import Console
from rich.table import Table

from launch.cache_line import size_text
from launch.workers import Nodes
from pipeline.data.loader import load_sample
from pipeline.resolve import Resolved, training_shards
from pipeline.train.forecast import (
    Activations,
    States,
    count_activations,
    count_node_bytes,
    count_reading,
    count_states,
    count_wire,
)
from pipeline.wording import counted

_SPEED_HINT = "unknown: add --images-per-second N, the rate of one GPU that a short run prints"


def print_forecast(run: Resolved, job: Nodes, images_per_second: float | None) -> None:
    """Print the forecast of a run that was checked.

    Args:
        images_per_second: of one process; None: hours are left out.
    """
    local = run.order.batch // job.world_size
    activations = count_activations(run, local // run.config.train.accumulate)
    states = [count_states(run.config, rank, job.world_size) for rank in (0, job.world_size - 1)]
    console = Console(highlight=False, soft_wrap=False, emoji=False, markup=False)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    lines = _lines(run, job, activations, images_per_second)
    if run.config.data.resident:
        lines["resident"] = _resident(run, job)
    for name, value in lines.items():
        table.add_row(name, value)
    wire = count_wire(run.config, states[0], run.params, job.world_size)
    table.add_row("network", f"each process sends {wire / 1e6:,.1f} MB a step, as rings do, and receives as much")
    console.print()
    console.print(table)
    console.print()
    console.print(_memory(run, states, activations.bytes))


def _lines(run: Resolved, job: Nodes, activations: Activations, images_per_second: float | None) -> dict[str, str]:
    world = job.world_size
    local = run.order.batch // world
    reading = count_reading(run.order, world)
    node = count_node_bytes(run.order, [shard.bytes for shard in run.train.shards], job.nproc, job.nodes)
    shards = " to ".join(f"{n:,}" for n in sorted(set(reading.shards)))
    return {
        "processes": f"{world:,} on {counted(job.nodes, 'node')}; each {counted(local, 'sample')} a step in "
        f"{counted(run.config.train.accumulate, 'micro-batch')}",
        "input": f"{_shape(activations.images)} per micro-batch",
        "tokens": "; ".join(f"{_shape(s)} in {counted(n, 'layer')}" for n, s in activations.layers),
        "reading": f"{counted(reading.lanes, 'lane')} per process; in an epoch {counted(reading.samples, 'sample')} "
        f"from {shards} shards per process, {reading.opened:,} openings of shards in all; "
        f"shards of {size_text(node.epoch)} per node",
        "time": _SPEED_HINT if images_per_second is None else _hours(run, world, images_per_second),
    }


def _resident(run: Resolved, job: Nodes) -> str:
    """What `data.resident` keeps on each device, taking all pictures to be as large as the first."""
    config, size = run.config, run.config.model.img_size
    assert size is not None, "resolve fills in the image size"
    channels = config.model.in_chans
    picture = load_sample(training_shards(config), 0, channels).picture
    training = run.train.num_samples * picture.width * picture.height * channels
    line = (
        f"{run.train.num_samples:,} pictures of {picture.width}x{picture.height}, read once: {training / 1e6:,.1f} MB"
    )
    if run.val is not None:
        evaluation = -(-run.val.num_samples // job.world_size) * size * size * channels * 4
        line += f"; inputs of evaluation: {evaluation / 1e6:,.1f} MB"
    return f"{line}; on each device, besides the memory below"


def _memory(run: Resolved, ranks: list[States], activations: int) -> Table:
    """One row for all processes, or one for the first, which has most of what is cut up, and one for the last."""
    engine = run.config.engine
    name = engine.name if engine.name != "deepspeed" else f"deepspeed, ZeRO {engine.zero_stage}"
    parts = [field.name for field in fields(States)]
    table = Table(title=f"memory of a process in MB, {name}", box=None, pad_edge=False, title_justify="left")
    for column in ("rank", *parts, "activations", "sum"):
        table.add_column(column, justify="left" if column == "rank" else "right", overflow="fold")
    first, last = ranks
    rows = {"each": first} if first == last else {"first": first, "last": last}
    for rank, states in rows.items():
        sizes = [*(getattr(states, part) for part in parts), activations, states.total + activations]
        table.add_row(rank, *(f"{size / 1e6:,.1f}" for size in sizes))
    return table


def _hours(run: Resolved, world_size: int, images_per_second: float) -> str:
    samples = run.plan.end_step * run.order.batch
    hours = samples / (images_per_second * world_size) / 3600
    return (
        f"{hours:,.2f} hours = {hours * world_size:,.1f} GPU-hours at {images_per_second:g} images/s on each of "
        f"{world_size:,}, evaluation and saving not counted"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
