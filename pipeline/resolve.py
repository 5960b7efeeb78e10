"""Filling in a config from its data and model, and every check that can be made before a process is started.

`resolve` is called once by the command, so that a mistake costs one message in a second, and once by every worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.manifest import Manifest
from pipeline.config import RunConfig
from pipeline.config_errors import ModelMistake
from pipeline.data.cache_room import CacheOptions
from pipeline.data.order import DataOrder, default_lanes
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.models import ImageModel, create_model, set_lean
from pipeline.models.batch_norm import BatchNorm2d
from pipeline.models.errors import UnknownOption
from pipeline.train.checkpoint import COMMIT
from pipeline.train.optim import lr_scales
from pipeline.train.plan import Plan
from pipeline.train.schedule import CosineSchedule
from pipeline.train.tasks import Task, make_task


@dataclass(frozen=True)
class Resolved:
    """A run with nothing left open.

    Attributes:
        config: the config with the classes, image size and lanes filled in; it reproduces the run.
        plan: its calendar.
        order: its data order.
        train, val: manifests of the splits.
        params: parameters of the model.
        macs: multiply-accumulates of one forward of one sample.
        task: the kind of run, with this config.
        drop_paths: stochastic-depth branches of the model, which the loader draws uniforms for.
        token_grid: side of the model's token grid where its tokens have labels, else None.
        lowest_lr_scale: learning rate of the first layers over that of the heads.
    """

    config: RunConfig
    plan: Plan
    order: DataOrder
    train: Manifest
    val: Manifest | None
    params: int
    macs: int
    task: Task
    drop_paths: int = 0
    token_grid: int | None = None
    lowest_lr_scale: float = 1.0

    @property
    def peak_lr(self) -> float:
        return self.config.optim.peak_lr(self.config.train.global_batch_size)

    @property
    def schedule(self) -> CosineSchedule:
        return make_schedule(self.config, self.plan)


def resolve(config: RunConfig, world_size: int) -> Resolved:
    """Fill in and check a config for a number of processes.

    Raises:
        UserError: data, model, batch and processes do not fit together; the message names the key to change.
    """
    lanes = config.data.lanes or default_lanes(config.train.global_batch_size)
    config = updated(config, data={"lanes": lanes})
    task = make_task(config)
    train, val = task.splits()
    config, model = task.fit(train, val)
    task = task.on(config)
    order = DataOrder(
        tuple(shard.samples for shard in train.shards),
        seed=config.seed,
        batch=config.train.global_batch_size,
        lanes=lanes,
        shuffle=config.data.shuffle,
        window=config.data.window,
        repeats=config.data.repeats,
    )
    plan = Plan.of(config, order.steps_per_epoch)
    _check_batch(config, order, world_size)
    _check_batch_norm(config, model, order, world_size)
    _check_schedule(config, plan)
    _check_spikes(config, plan)
    found = task.check(model, train, order, world_size)
    found["lowest_lr_scale"] = min(lr_scales(model, config.optim.layer_decay).values())
    params = sum(p.numel() for p in model.parameters())
    return Resolved(config, plan, order, train, val, params, _macs(task, model), task, **found)


# A sweep resolves many runs of few models, and counting takes the most of that time.
_COUNTED: dict[str, int] = {}


def _macs(task: Task, model: nn.Module) -> int:
    key = task.config.model_dump_json(include={"task", "model"})
    if key not in _COUNTED:
        _COUNTED[key] = task.macs(model)
    return _COUNTED[key]


def training_shards(config: RunConfig, cache: CacheOptions | None = None) -> ShardSet:
    """The shards of `data.train`.

    A lost shard is a mistake where a run begins. One that goes on does what it would have done had it not been stopped:
    it takes other samples, as `data.max_bad_samples` says.

    Raises:
        UserError: no manifest, or a shard that is missing or of another size.
    """
    check_files = config.data.max_bad_samples == 0 or not continues(config)
    return ShardSet(config.data.train, cache, check_files)


def _check_spikes(config: RunConfig, plan: Plan) -> None:
    if config.train.spike_factor is not None and plan.save_every % plan.log_every:
        raise UserError(
            f"train.spike_factor: checkpoint.every={config.checkpoint.every} ({plan.save_every} steps) must be a "
            f"multiple of train.log_every={config.train.log_every} ({plan.log_every}); "
            "else a run that goes on there would see other windows of losses"
        )


def make_schedule(config: RunConfig, plan: Plan) -> CosineSchedule:
    """The learning rates of a run."""
    settings = config.optim.schedule
    return CosineSchedule(
        peak=config.optim.peak_lr(config.train.global_batch_size),
        floor=settings.min_lr,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        warmup_lr=settings.warmup_lr,
        cooldown_steps=plan.cooldown_steps,
        delay_steps=plan.delay_steps,
        by=settings.by,
        cosine=settings.cosine,
        epoch_steps=plan.steps_per_epoch,
    )


def build_model(config: RunConfig, device: str | torch.device) -> ImageModel:
    """The model of a config; the caller seeds torch.

    Raises:
        UserError: no such model, or arguments that it can't take.
    """
    try:
        with torch.device(device):
            model = create_model(config.model.name, **config.model.overrides())
    except UnknownOption as error:
        raise ModelMistake(
            f"{error}. To leave out the options of another model that a recipe comes with, "
            "write model.options=null before your own"
        ) from error
    except (ValueError, TypeError) as error:
        raise ModelMistake(error) from error
    set_recomputation(model, config)
    return model


def set_recomputation(model: Any, config: RunConfig) -> None:
    """Do what `train.activation_checkpointing` says.

    Raises:
        UserError: it is about attention maps, and the model refines none.
    """
    if config.train.activation_checkpointing is True:
        model.set_grad_checkpointing()
    elif config.train.activation_checkpointing == "maps" and not set_lean(model):
        raise UserError(
            f"train.activation_checkpointing=maps: {config.model.name} refines no attention maps; set it to true to "
            "recompute whole layers, or add model.options.refine={}"
        )


def continues(config: RunConfig) -> bool:
    """Whether the run directory holds a checkpoint, whose weights count rather than those of `model.init`."""
    return any(Path(config.out, config.name, "checkpoints").glob(f"step-*/{COMMIT}"))


def updated(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The config with other values in some sections."""
    tree = config.model_dump(mode="json")
    for section, values in sections.items():
        tree[section] |= values
    return RunConfig.model_validate(tree)


def _check_batch(config: RunConfig, order: DataOrder, world_size: int) -> None:
    order.check_world_size(world_size)
    local = order.batch // world_size
    if local % config.train.accumulate:
        raise UserError(
            f"train.accumulate={config.train.accumulate} does not divide the {local} samples that each of {world_size} "
            f"processes has of train.global_batch_size={order.batch}; set train.accumulate to a divisor of {local}"
        )


def _check_batch_norm(config: RunConfig, model: nn.Module, order: DataOrder, world_size: int) -> None:
    micro_batch = order.batch // world_size // config.train.accumulate
    if micro_batch % order.chunk and any(isinstance(module, BatchNorm2d) for module in model.modules()):
        raise UserError(
            f"the BatchNorms of {config.model.name} see the {order.chunk} samples of a lane at a time, but "
            f"train.accumulate={config.train.accumulate} leaves {micro_batch} samples to a micro-batch; set "
            f"train.accumulate to a divisor of {order.lanes // world_size}, or more data.lanes"
        )


def _check_schedule(config: RunConfig, plan: Plan) -> None:
    settings = config.optim.schedule
    ramps = {"warmup": plan.warmup_steps, "delay": plan.delay_steps, "cooldown": plan.cooldown_steps}
    if sum(ramps.values()) < plan.total_steps:
        return
    named = " + ".join(f"{key}={getattr(settings, key)} ({steps} steps)" for key, steps in ramps.items() if steps)
    longest = max(ramps, key=ramps.__getitem__)
    raise UserError(
        f"optim.schedule: {named} leaves nothing of train.epochs={config.train.epochs} ({plan.total_steps} steps) "
        f"to the cosine; shorten it (optim.schedule.{longest}=0ep)"
    )
