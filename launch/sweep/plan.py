"""Every trial as the run that it will be, checked before anything is started."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from launch.sweep.config import Pbt, SweepConfig
from launch.sweep.milestones import Length, Milestone, milestones
from launch.sweep.space import Values, arguments_of, shown
from pipeline.config import RunConfig
from pipeline.config_load import load_config
from pipeline.errors import Unreachable, UserError
from pipeline.resolve import Resolved, resolve
from pipeline.train.same_run import check_same_run

# Keys that a run can change in the middle: its weights, optimizer state, data order and calendar stay what they are.
VARIABLE = (
    "augment.",
    "mix.",
    "model.drop_path_rate",
    "objective.cls_weight",
    "objective.cos_weight",
    "objective.dense_weight",
    "optim.betas",
    "optim.eps",
    "optim.layer_decay",
    "optim.lr",
    "optim.schedule.",
    "optim.weight_decay",
    "train.clip_grad_norm",
)


def run_config(config: SweepConfig, name: str, values: Values) -> RunConfig:
    """The config of a trial's run.

    Raises:
        UserError: it can't be; the message names the trial's values.
    """
    recipe, *overrides = arguments_of(config, name, values)
    try:
        return load_config(recipe, overrides)
    except UserError as error:
        raise _about(name, values, error) from error


def plan_trial(config: SweepConfig, name: str, values: Values) -> tuple[Length, Resolved]:
    """Check a trial as `rookery train --dry-run` would.

    Raises:
        UserError: it can't run; the message names the trial's values.
    """
    run = run_config(config, name, values)
    try:
        resolved = resolve(run, config.resources.world_size)
        if resolved.val is None:
            raise UserError("data.val is missing: a sweep judges its trials by their evaluations")
        if config.metric not in resolved.task.figures:
            there = ", ".join(resolved.task.figures)
            raise UserError(f"metric={config.metric}: the evaluations of this run measure {there}; choose one of them")
        check_same_run(Path(run.out, run.name), resolved)
    except UserError as error:
        raise _about(name, values, error) from error
    return Length(resolved.plan.end_step, resolved.plan.steps_per_epoch), resolved


def plan_milestones(config: SweepConfig, lengths: Iterable[Length]) -> list[Milestone]:
    """Where trials end a part of their run and wait for the scheduler.

    Raises:
        UserError: the scheduler compares trials of different lengths, or its own lengths don't fit theirs, or it
            would vary what a run can't change.
    """
    if isinstance(config.scheduler, Pbt):
        for key in config.space:
            if not key.startswith(VARIABLE):
                raise UserError(
                    f"scheduler=pbt can't vary {key}, which a run keeps from its first step to its last; it can vary "
                    f"{', '.join(prefix.rstrip('.') for prefix in VARIABLE)}"
                )
    epochs = {length.epochs for length in lengths}
    if config.scheduler.kind != "fifo" and len({round(length, 3) for length in epochs}) > 1:
        raise UserError(
            f"scheduler={config.scheduler.kind} compares trials at equal epochs, but they end after "
            f"{', '.join(f'{length:.4g}' for length in sorted(epochs))} epochs; give them one train.epochs, "
            "or take scheduler=fifo"
        )
    return milestones(config.scheduler, max(epochs))


def _about(name: str, values: Values, error: UserError) -> UserError:
    kind = Unreachable if isinstance(error, Unreachable) else UserError
    return kind(f"trial {name} ({shown(values)}): {error}")
