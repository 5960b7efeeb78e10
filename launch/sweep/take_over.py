"""Population based training: one trial goes on from the checkpoint of another, under values of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from launch.sweep.config import SweepConfig
from launch.sweep.records import TAKEN_OVER
from launch.sweep.space import Values
from pipeline.tracking.files import append_line, read_json, read_lines
from pipeline.tracking.metrics import MetricsLog, read_metrics
from pipeline.tracking.run_dir import RESULT_NAME, save_config

# Checkpoints that trials have ended rounds with, beside the run directories: the runs themselves keep only the newest.
GIVEN = "given"
_KEPT = 2


def give(run: Path, step: int) -> None:
    """Keep a run's checkpoint of a step for others, as links to the same files where the disk has them.

    Raises:
        FileNotFoundError: the run has no such checkpoint, as on a full disk.
    """
    name = f"step-{step:08d}"
    given = _given(run)
    if not (given / name).exists():
        part = given / ".part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(run / "checkpoints" / name, part, copy_function=_link)
        part.rename(given / name)
    for old in sorted(given.glob("step-*"))[:-_KEPT]:
        shutil.rmtree(old)


def take_over(config: SweepConfig, run: Path, values: Values, donor: str, step: int, ticket: str) -> None:
    """Let a run go on from another trial's weights and optimizer; killed in the middle, it can be called again.

    What the run measured until that step stays in its `metrics.jsonl`, with an event that names the donor; so do its
    best weights.

    Args:
        run: the run directory; its config becomes that of `values`.
        donor: name of the other trial.
        step: of the checkpoint that it gave.
        ticket: what was taken over already is known by it.

    Raises:
        RuntimeError: the donor's checkpoint is missing or damaged.
    """
    if any(is_taken(line, donor, step, ticket) for line in read_lines(run / TAKEN_OVER)):
        return
    # torch takes seconds to import, and most trials never come here.
    from launch.sweep.plan import run_config
    from pipeline.resolve import resolve
    from pipeline.train.checkpoint import CheckpointStore, install

    given = CheckpointStore(_given(run.parent / donor)).newest(until=step)
    if given is None or given.step != step:
        raise RuntimeError(f"{donor} has left no checkpoint of step {step} in {_given(run.parent / donor)}")
    own = CheckpointStore(run / "checkpoints").newest()
    if own is not None and own.step >= step:
        kept = {key: own.progress()[key] for key in ("best", "seconds")}
    else:  # killed when its own had made way, and the donor's was not yet there
        result = read_json(run / RESULT_NAME) or {}
        kept = {key: result[name] for key, name in (("best", "best"), ("seconds", "wall_seconds")) if name in result}
    resolved = resolve(run_config(config, run.name, values), config.resources.world_size)
    install(given, run / "checkpoints", given.progress() | kept)
    save_config(run, resolved.config.model_dump(mode="json"))
    metrics = MetricsLog(run)
    if not any(_says(line, donor, step) for line in read_metrics(run)):
        samples, epoch = step * resolved.order.batch, resolved.plan.epoch(step)
        metrics.log("event", step, samples=samples, epoch=epoch, event="taken_over", donor=donor, values=values)
    metrics.close()
    append_line(run / TAKEN_OVER, {"ticket": ticket, "donor": donor, "step": step, "values": values})


def is_taken(line: dict[str, Any], donor: str, step: int, ticket: str) -> bool:
    """Whether a line of `taken_over.jsonl` is about this one; with another `scheduler.every` tickets may be equal."""
    return (line["donor"], line["step"], line["ticket"]) == (donor, step, ticket)


def can_give(run: Path, step: int) -> bool:
    """Whether a run has, or has given, its checkpoint of a step."""
    name = f"step-{step:08d}"
    return (run / "checkpoints" / name / "commit.json").exists() or (_given(run) / name).exists()


def _says(line: dict[str, Any], donor: str, step: int) -> bool:
    return line.get("event") == "taken_over" and (line["donor"], line["step"]) == (donor, step)


def _given(run: Path) -> Path:
    return run.parent.parent / GIVEN / run.name


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
