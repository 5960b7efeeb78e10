"""Filling in a config from its data and model, and every check that can be made before a process is started.

`resolve` is called once by the command, so that a mistake costs one message in a second, and once by every worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from data_prep.manifest import Manifest
from pipeline.config import RunConfig
from pipeline.data.order import DataOrder, default_lanes
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.models import ImageModel, create_model, num_drop_paths
from pipeline.models.facts import count_macs
from pipeline.train.plan import Plan
from pipeline.train.schedule import CosineSchedule


@dataclass(frozen=True)
class Resolved:
    """A run with nothing left open.

    Attributes:
        config: the config with the classes, image size and lanes filled in; it reproduces the run.
        plan: its calendar.
        order: its data order.
        train, val: manifests of the splits.
        params: parameters of the model.
        drop_paths: stochastic-depth branches of the model, which the loader draws uniforms for.
        macs: multiply-accumulates of one forward of one image.
    """

    config: RunConfig
    plan: Plan
    order: DataOrder
    train: Manifest
    val: Manifest | None
    params: int
    drop_paths: int
    macs: int

    @property
    def peak_lr(self) -> float:
        return self.config.optim.peak_lr(self.config.train.global_batch_size)

    @property
    def schedule(self) -> CosineSchedule:
        floor = self.config.optim.schedule.min_lr
        return CosineSchedule(self.peak_lr, floor, self.plan.warmup_steps, self.plan.total_steps)


def resolve(config: RunConfig, world_size: int) -> Resolved:
    """Fill in and check a config for a number of processes.

    Raises:
        UserError: data, model, batch and processes do not fit together; the message names the key to change.
    """
    train = ShardSet(config.data.train).manifest
    val = None if config.data.val is None else ShardSet(config.data.val).manifest
    lanes = config.data.lanes or default_lanes(config.train.global_batch_size)
    classes = config.model.num_classes or train.num_classes
    config = _update(config, model={"num_classes": classes}, data={"lanes": lanes})
    _check_classes(config, train, val)
    model = build_model(config, "meta")
    config = _update(config, model={"img_size": model.img_size})
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
    _check_schedule(config, plan)
    params = sum(p.numel() for p in model.parameters())
    macs = count_macs(model)
    return Resolved(config, plan, order, train, val, params, num_drop_paths(model), macs)


def build_model(config: RunConfig, device: str | torch.device) -> ImageModel:
    """The model of a config; the caller seeds torch.

    Raises:
        UserError: no such model, or arguments that it can't take.
    """
    try:
        with torch.device(device):
            model = create_model(config.model.name, **config.model.overrides())
        if config.train.activation_checkpointing:
            model.set_grad_checkpointing(True)
    except (ValueError, TypeError) as error:
        raise UserError(f"model: {error}") from error
    return model


def _update(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    tree = config.model_dump(mode="json")
    for section, values in sections.items():
        tree[section] |= values
    return RunConfig.model_validate(tree)


def _check_classes(config: RunConfig, train: Manifest, val: Manifest | None) -> None:
    classes = config.model.num_classes
    if classes != train.num_classes:
        raise UserError(
            f"model.num_classes={classes}, but data.train={config.data.train} has {train.num_classes} classes; "
            "leave model.num_classes out, or point data.train at the matching shards"
        )
    if val is not None and val.classes != train.classes:
        different = next((a, b) for a, b in zip_longest(train.classes, val.classes) if a != b)
        raise UserError(
            f"data.val={config.data.val} has other classes than data.train={config.data.train} "
            f"({val.num_classes} and {train.num_classes}; the first difference: {different[1]!r}, {different[0]!r}); "
            "prepare both splits from the same class list"
        )


def _check_batch(config: RunConfig, order: DataOrder, world_size: int) -> None:
    order.check_world_size(world_size)
    local = order.batch // world_size
    if local % config.train.accumulate:
        raise UserError(
            f"train.accumulate={config.train.accumulate} does not divide the {local} samples that each of {world_size} "
            f"processes has of train.global_batch_size={order.batch}; set train.accumulate to a divisor of {local}"
        )
    if config.mix.active and order.chunk < 2:
        raise UserError(
            f"mixup and CutMix take their partners from the same lane, but data.lanes={order.lanes} leaves one sample "
            f"a step to each; set data.lanes to {order.batch // 2} or fewer, or turn mixing off (mix.prob=0)"
        )


def _check_schedule(config: RunConfig, plan: Plan) -> None:
    if plan.warmup_steps >= plan.total_steps:
        raise UserError(
            f"optim.schedule.warmup={config.optim.schedule.warmup} ({plan.warmup_steps} steps) leaves nothing of "
            f"train.epochs={config.train.epochs} ({plan.total_steps} steps); shorten it (optim.schedule.warmup=0ep)"
        )
