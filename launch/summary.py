"""What a run is about to do, on one screen."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from launch.cache_line import cache_line
from launch.workers import Nodes
from pipeline.resolve import Resolved
from pipeline.tracking.redact import redact
from pipeline.wording import counted

_OPTIMIZER_COPIES = 4  # weights, gradients and AdamW's two moments, all float32


def print_summary(run: Resolved, job: Nodes) -> None:
    """Print model, data, batch, learning rate and calendar of a run."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in summary(run, job).items():
        table.add_row(name, value)
    Console(highlight=False, soft_wrap=False, emoji=False, markup=False).print(table)


def summary(run: Resolved, job: Nodes) -> dict[str, str]:
    """The lines of the summary, by name."""
    config, plan, order = run.config, run.plan, run.order
    train, optim = config.train, config.optim
    local = order.batch // job.world_size
    rule = f" = {optim.lr:g} x {order.batch} / {optim.lr_batch}" if optim.lr_batch else ""
    parts = job.world_size if config.engine.name == "fsdp" else 1
    state = run.params * 4 * (_OPTIMIZER_COPIES + (train.ema_decay is not None)) / parts / 1e6
    cache = cache_line(run, job)
    ends = "" if plan.end_step == plan.total_steps else f", stops after {plan.end_step:,}"
    return {
        "run": f"{config.out}/{config.name}",
        "model": f"{config.model.name}, {run.params:,} parameters, {run.macs / 1e9:.3f} GMACs "
        f"{run.task.summary(run.train)}" + ("" if config.model.init is None else f"; starts from {config.model.init}"),
        "data": f"{redact(config.data.train)}, {counted(run.train.num_samples, 'sample')} in "
        f"{counted(len(run.train.shards), 'shard')}"
        + ("" if run.val is None else f"; evaluated on {run.val.num_samples:,} of {redact(config.data.val)}"),
        **({} if cache is None else {"cache": cache}),
        "batch": f"{order.batch} = {counted(job.world_size, 'process')} x {counted(train.accumulate, 'micro-batch')} x "
        f"{local // train.accumulate}; {counted(order.lanes, 'lane')} of {counted(order.chunk, 'sample')} a step",
        "learning rate": f"{run.peak_lr:.4g}{rule}; warm-up {counted(plan.warmup_steps, 'step')}, then cosine to "
        f"{optim.schedule.min_lr:g}{_epoch_rule(run)}{_layer_rule(run)}; weight decay {optim.weight_decay:g}",
        "length": f"{train.epochs} = {counted(plan.total_steps, 'step')} of {plan.steps_per_epoch:,} an epoch"
        f" = {counted(plan.total_steps * order.batch, 'sample')}{ends}",
        "compute": f"{train.precision}, {config.engine.name}; "
        f"{6 * run.macs * plan.end_step * order.batch / 1e15:.4g} PFLOP in all",
        "memory": f"{state:,.0f} MB per process for weights, gradients and optimizer, activations not counted",
    }


def _epoch_rule(run: Resolved) -> str:
    schedule = run.config.optim.schedule
    parts = [
        "one rate an epoch" if schedule.by == "epoch" else "",
        f"{schedule.delay} late" if run.plan.delay_steps else "",
        f"the last {schedule.cooldown} at that" if run.plan.cooldown_steps else "",
    ]
    return "".join(f", {part}" for part in parts if part)


def _layer_rule(run: Resolved) -> str:
    decay = run.config.optim.layer_decay
    if decay == 1:
        return ""
    lowest = run.peak_lr * run.lowest_lr_scale
    return f"; that is the heads', times {decay:g} for every layer before, at the peak {lowest:.4g} for the first"
