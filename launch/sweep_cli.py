"""`rookery sweep`: many runs of a recipe on a Ray cluster, or on this machine."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from launch.sweep.config import SweepConfig
    from launch.sweep.milestones import Calendar
    from launch.sweep.records import Records

# Of a searcher that waits for results, so many trials are drawn and checked before anything is started.
_TRIED = 8


def sweep(
    file: Annotated[Path, typer.Argument(help="sweep, such as configs/sweep/cifar10.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value ...: keys of a sweep change it, all others its recipe")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="running Ray cluster (auto, HOST:PORT); default: RAY_ADDRESS, else this machine")
    ] = None,
    on_allocation: Annotated[
        bool, typer.Option("--on-allocation", help="inside a Slurm job: start Ray on all of its nodes for this sweep")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="print the trials and check every one, without starting Ray")] = False,
) -> None:
    """Train many variants of a recipe; the same command again goes on with a sweep that was stopped.

    Exit status: 0 all trials are over, or the budget is used up; 1 some failed; 2 a mistake in the sweep or a recipe;
    after checkpoints 130 when Ctrl-C or SIGTERM asked for it, and 75 when SIGUSR1 did.
    """
    from launch.sweep.config import load_sweep
    from launch.sweep.records import Records
    from pipeline.errors import UserError
    from pipeline.streams import drop_unprintable
    from pipeline.train.status import RESUBMIT

    if not dry_run:
        drop_unprintable()
    wanted = load_sweep(file, overrides or [])
    records = Records(wanted)
    calendar = _planned(wanted, records)
    if dry_run:
        return
    if on_allocation and address is not None:
        raise UserError("--on-allocation starts a Ray of its own; leave --address out")
    from launch.sweep.allocation import ray_on_allocation, requeue
    from launch.sweep.cluster import cluster_facts, connected

    with ExitStack() as stack:
        stack.enter_context(records.locked())
        if records.is_outdated():  # it was still running when the plan was made
            records = Records(wanted)
            calendar = _planned(wanted, records)
        before = records.epochs()
        if on_allocation:
            address = stack.enter_context(ray_on_allocation())
        ray = stack.enter_context(connected(address))
        from launch.sweep.driver import run_sweep

        facts = cluster_facts(ray, wanted.resources)
        if facts.lacks is not None:
            if address is None or on_allocation:
                raise UserError(f"{facts.lacks}; lower resources.nodes, resources.nproc or resources.cpus")
            typer.echo(f"{facts.lacks}: waiting for more", err=True)
        status = run_sweep(wanted, records, calendar, facts)
    if on_allocation and status == RESUBMIT:
        requeue(records.epochs() > before)
    raise typer.Exit(status)


def _planned(wanted: SweepConfig, records: Records) -> Calendar:
    """Check every trial that is known, print them all, and add them to the records."""
    from rich.console import Console
    from rich.table import Table

    from launch.sweep.milestones import Calendar
    from launch.sweep.plan import plan_milestones, plan_trial
    from launch.sweep.space import Hashed, axes, draw, drawn_trials, shown

    is_waiting = wanted.searcher.kind == "optuna"
    if is_waiting:
        space, seed = axes(wanted), wanted.searcher.seed
        tried = [draw(space, Hashed(seed, i), {}) for i in range(min(_TRIED, wanted.trials or _TRIED))]
        examples = {f"example-{i}": values for i, values in enumerate(tried)}
    else:
        for values in drawn_trials(wanted)[len(records.all()) :]:
            records.add(values)
        examples = {}
    known = {record.name: record.values for record in records.all()}
    table = Table(box=None, pad_edge=False)
    for column in ("trial", "values", "epochs", "steps", "parameters", "GMACs", "peak lr"):
        table.add_column(column, justify="left" if column in ("trial", "values") else "right", overflow="fold")
    lengths = {}
    for name, values in (known or examples).items():
        length, run = plan_trial(wanted, name, values)
        lengths[name] = length
        numbers = (f"{length.epochs:.4g}", f"{length.end_step:,}", f"{run.params:,}", f"{run.macs / 1e9:.3f}")
        table.add_row(name, shown(values), *numbers, f"{run.peak_lr:.4g}")
    parts = plan_milestones(wanted, lengths.values())
    console = Console(highlight=False, soft_wrap=False, emoji=False, markup=False)
    calendar = Calendar({name: lengths[name] for name in known}, parts, max(each.epochs for each in lengths.values()))
    for line in _about(wanted, records, calendar):
        console.print(line, soft_wrap=True)
    console.print(table)
    return calendar


def _about(wanted: SweepConfig, records: Records, calendar: Calendar) -> list[str]:
    from pipeline.wording import counted

    resources, scheduler = wanted.resources, wanted.scheduler
    settings = " ".join(f"{k}={v}" for k, v in scheduler.model_dump(mode="json").items() if k != "kind")
    stops = ", ".join(f"{milestone.epochs:.4g}" for milestone in calendar.milestones)
    waits = f"; trials wait at epoch {stops}" if stops else ""
    gpus = "the GPUs there are" if resources.gpus is None else counted(resources.nproc * resources.gpus, "GPU")
    at_a_time = "as many as fit" if wanted.concurrent is None else f"{wanted.concurrent} at a time"
    count = wanted.trials or len(records.all())
    limits = [f"{value:g} {name}" for name, value in wanted.budget if value is not None]
    return [
        f"sweep      {wanted.folder}: {counted(count, 'trial')} of {calendar.epochs:.4g} epochs at most, {at_a_time}",
        f"judged by  {wanted.metric}, {'the highest' if wanted.is_max else 'the lowest'}",
        f"scheduler  {scheduler.kind} {settings}".rstrip() + waits,
        f"searcher   {wanted.searcher.kind}, seed {wanted.searcher.seed}",
        f"a trial    {counted(resources.nodes, 'node')} x {counted(resources.nproc, 'process')}, on each node "
        f"{counted(resources.nproc * resources.cpus, 'core')} and {gpus}",
        f"budget     {' and '.join(limits) or 'none'}",
        "",
    ]
