"""Filling in a config from its data and model, and every check that can be made before a process is started.

`resolve` is called once by the command, so that a mistake costs one message in a second, and once by every worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from data_prep.manifest import Manifest
from data_prep.store import is_remote
from pipeline.config import RunConfig
from pipeline.data.cache_room import CacheOptions
from pipeline.data.order import DataOrder, default_lanes
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.explain.gradcat import check_tree
from pipeline.models import ImageModel, create_model, num_drop_paths
from pipeline.models.batch_norm import BatchNorm2d
from pipeline.models.errors import UnknownOption
from pipeline.models.facts import count_macs
from pipeline.train.checkpoint import COMMIT
from pipeline.train.init_weights import check_init
from pipeline.train.objective import check_objective
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
        token_grid: side of the model's token grid where its tokens have labels, else None.
    """

    config: RunConfig
    plan: Plan
    order: DataOrder
    train: Manifest
    val: Manifest | None
    params: int
    drop_paths: int
    macs: int
    token_grid: int | None = None

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
    train = training_shards(config).manifest
    val = None if config.data.val is None else ShardSet(config.data.val).manifest
    lanes = config.data.lanes or default_lanes(config.train.global_batch_size)
    classes = config.model.num_classes or train.num_classes
    config = _update(config, model={"num_classes": classes}, data={"lanes": lanes})
    _check_classes(config, train, val)
    _check_cache(config, train, val)
    model = build_model(config, "meta")
    _check_explain(config, model)
    if config.model.init is not None and not _continues(config):
        check_init(model, config.model, train.classes)
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
    _check_batch_norm(config, model, order, world_size)
    _check_schedule(config, plan)
    _check_spikes(config, plan)
    token_grid = check_objective(config, model, train, order, world_size)
    params = sum(p.numel() for p in model.parameters())
    macs = _macs(config.model.model_dump_json(), model)
    return Resolved(config, plan, order, train, val, params, num_drop_paths(model), macs, token_grid)


# A sweep resolves many runs of few models, and counting takes the most of that time.
_COUNTED: dict[str, int] = {}


def _macs(key: str, model: ImageModel) -> int:
    if key not in _COUNTED:
        _COUNTED[key] = count_macs(model)
    return _COUNTED[key]


def training_shards(config: RunConfig, cache: CacheOptions | None = None) -> ShardSet:
    """The shards of `data.train`.

    A lost shard is a mistake where a run begins. One that goes on does what it would have done had it not been stopped:
    it takes other samples, as `data.max_bad_samples` says.

    Raises:
        UserError: no manifest, or a shard that is missing or of another size.
    """
    check_files = config.data.max_bad_samples == 0 or not _continues(config)
    return ShardSet(config.data.train, cache, check_files)


def _check_explain(config: RunConfig, model: ImageModel) -> None:
    if config.explain.images:
        try:
            check_tree(model)
        except UserError as error:
            raise UserError(f"explain.images={config.explain.images}: {error}; set explain.images=0") from error


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
        if config.train.activation_checkpointing:
            model.set_grad_checkpointing(True)
    except UnknownOption as error:
        raise UserError(
            f"model: {error}. To leave out the options of another model that a recipe comes with, "
            "write model.options=null before your own"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"model: {error}") from error
    return model


def _continues(config: RunConfig) -> bool:
    """Whether the run directory holds a checkpoint, whose weights count rather than those of `model.init`."""
    return any(Path(config.out, config.name, "checkpoints").glob(f"step-*/{COMMIT}"))


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


def _check_cache(config: RunConfig, train: Manifest, val: Manifest | None) -> None:
    limit = config.data.cache_gb
    for key, place, manifest in (("train", config.data.train, train), ("val", config.data.val, val)):
        if limit is None or place is None or manifest is None or not is_remote(place):
            continue
        largest = max((shard.bytes for shard in manifest.shards), default=0)
        if largest > limit * 1e9:
            raise UserError(
                f"data.cache_gb={limit:g} has no room for a shard of data.{key}={place} ({largest / 1e9:.3g} GB); "
                "raise it (a process needs one shard at a time; with less than a window of the shuffle holds, see "
                "--dry-run, shards are fetched again and again)"
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
        most = order.batch // 2
        fewer = (
            f"set data.lanes to {most} or fewer"
            if world_size <= most
            else f"take at most {most} processes, or train.global_batch_size={2 * world_size}"
        )
        raise UserError(
            f"mixup and CutMix take their partners from the same lane, but data.lanes={order.lanes} leaves one sample "
            f"a step to each; {fewer}, or turn mixing off (mix.prob=0)"
        )


def _check_batch_norm(config: RunConfig, model: ImageModel, order: DataOrder, world_size: int) -> None:
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
