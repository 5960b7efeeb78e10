"""Settings of a run that can't be together; `pipeline.config` asks when a config is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import RunConfig


def conflicts(config: RunConfig) -> Iterator[str]:
    """What of a config can't be together, each with what to change."""
    if config.task.kind == "language":
        yield from _pictures_in_language(config)
    batch, lanes = config.train.global_batch_size, config.data.lanes
    if lanes is not None and batch % lanes:
        yield (
            f"data.lanes={lanes} does not divide train.global_batch_size={batch}; "
            f"set data.lanes to a divisor of {batch} (or leave it out)"
        )
    if config.model.init_head == "new" and config.model.init is None:
        yield "model.init_head=new goes with weights to start from: set model.init, or leave model.init_head out"
    if config.eval.weights == "ema" and config.train.ema_decay is None:
        yield "eval.weights=ema needs an average to evaluate: set train.ema_decay (0.9999, say)"
    if config.data.resident:
        yield from _not_resident(config)
    if config.explain.images and config.data.val is None:
        yield "explain.images draws after evaluations, and there is no split for them: set data.val"
    if config.engine.offload_optimizer and (config.engine.name != "deepspeed" or config.engine.zero_stage == 0):
        yield "engine.offload_optimizer=true goes with engine.name=deepspeed and engine.zero_stage=1, 2 or 3"
    if config.checkpoint.compact and config.engine.name != "ddp":
        yield f"checkpoint.compact=true goes with engine.name=ddp, not {config.engine.name}: set it to false"
    if config.checkpoint.part_mb is not None and config.engine.name != "ddp":
        yield f"checkpoint.part_mb goes with engine.name=ddp, not {config.engine.name}: set it to null"
    peak, schedule = config.optim.peak_lr(batch), config.optim.schedule
    for key, rate in (("min_lr", schedule.min_lr), ("warmup_lr", schedule.warmup_lr)):
        if rate > peak:
            yield f"optim.schedule.{key}={rate:g} is above the peak learning rate {peak:g}; lower it"
    objective = config.objective
    if not objective.token_labels:
        for key in ("mix_token", "official_roi_order"):
            if getattr(objective, key):
                yield f"objective.{key}=true goes with labels for tokens: set objective.token_labels=true"
        if objective.cls_weight == 0:
            yield "objective.cls_weight=0 leaves no labels to learn from: set objective.token_labels=true"
    elif objective.cls_weight == objective.dense_weight == 0:
        yield "objective.cls_weight=0 and objective.dense_weight=0 leave nothing to learn: set one of them above 0"
    try:
        config.augment.mean_std(config.model.in_chans)
    except UserError as error:
        yield str(error)


def _not_resident(config: RunConfig) -> Iterator[str]:
    """What `data.resident` can't be together with."""
    fault = config.augment.off_device()
    if config.task.kind == "language":
        fault = "task=language has no pictures"
    elif config.data.augment_by == "pillow":
        fault = "data.augment_by=pillow augments on the host"
    elif config.objective.token_labels:
        fault = "objective.token_labels=true reads label maps from the shards"
    if fault is not None:
        yield f"data.resident=true augments pictures on the device, but {fault}; or set data.resident=false"


def _pictures_in_language(config: RunConfig) -> Iterator[str]:
    for section in ("augment", "eval_transform", "mix", "objective", "explain"):
        if getattr(config, section) != type(config).model_fields[section].default:
            yield f"{section} is for pictures, and task=language has none: leave it out"
    for key in ("img_size", "drop_path_rate"):
        if getattr(config.model, key) is not None:
            yield f"model.{key} is of image models, and task=language has none: leave it out"
    if config.tracking.register_model is not None:
        yield "tracking.register_model registers picture classifiers: leave it out with task=language"
