"""The parts of a training run, built from its resolved config."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from copy import copy
from functools import partial

import numpy as np
import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.data.ahead import fetched_ahead
from pipeline.data.augment.finish import Finish
from pipeline.data.augment.transforms import build_eval_transform, build_train_transform
from pipeline.data.fast.transform import FastTransform
from pipeline.data.loader import (
    Batches,
    EvalBatch,
    EvalDataset,
    StepDataset,
    TokenLabelOptions,
    TrainBatch,
    load_sample,
)
from pipeline.data.order import DataOrder
from pipeline.data.resident.augment import DeviceAugment
from pipeline.data.resident.dataset import KeptBatches, PlanDataset
from pipeline.data.resident.plan import Planner
from pipeline.data.resident.split import decode_split
from pipeline.data.shards import ShardSet
from pipeline.hashing import seed64
from pipeline.resolve import Resolved, build_model, training_shards
from pipeline.train.copies import on_device
from pipeline.train.cores import num_cores
from pipeline.train.distributed import World
from pipeline.train.init_weights import load_init
from pipeline.trees import flatten

# Where a node finds the data, and what its loaders use, may be its own.
OWN_KEYS = ("data.train", "data.val", "data.cache", "data.cache_gb", "data.workers", "data.prefetch", "data.resident")

# Parts of a node's cache that shards may fill before they are needed, in training and in evaluation.
_TRAIN_SHARE, _EVAL_SHARE = 0.75, 0.125

INIT_STREAM = 100


def initial_model(config: RunConfig, world: World, resumed: bool = False) -> nn.Module:
    """The model that a run starts from, on this process's device, equal on all of them.

    Weights are drawn on the CPU: a GPU's generator gives other numbers, and a run should start the same everywhere.

    Args:
        resumed: a checkpoint will replace the weights, so that `model.init` need not be there any more.

    Raises:
        UserError: `model.init` can't be read, or doesn't fit the model.
    """
    torch.manual_seed(seed64(config.seed, INIT_STREAM))
    model = build_model(config, "cpu")
    if config.model.init is not None and not resumed:
        load_init(model, config.model)
    return model.to(world.device)


def device_batches(run: Resolved, shards: ShardSet, world: World, start: int) -> Iterator[TrainBatch]:
    """This process's batches from global step `start` to the end of the run, on its device, ready for the model.

    Raises:
        UserError: `data.resident` asks for what the split can't give.
    """
    config, device = run.config, world.device
    size, channels = config.model.img_size, config.model.in_chans
    finish = Finish(config.augment, channels)
    if not config.data.resident:
        return on_device(train_batches(run, shards, world, start), device, finish)
    assert size is not None, "resolve fills in the image size"
    workers, prefetch = loader_workers(config), config.data.prefetch
    began = time.monotonic()
    split = decode_split(shards, channels, workers, prefetch, device)
    if world.is_main:
        size_and_time = f"{split.pictures.nbytes / 1e6:,.0f} MB on {device}, {time.monotonic() - began:.1f} s"
        print(f"{len(shards):,} pictures decoded: {size_and_time}", file=sys.stderr, flush=True)
    height, width = split.pictures.shape[2:]
    planner = Planner(config.augment, height, width, size, channels)
    dataset = PlanDataset(
        shards,
        split.labels,
        split.faults,
        run.order,
        planner,
        config.mix,
        size,
        run.drop_paths,
        world.rank,
        world.size,
        replace_bad=config.data.max_bad_samples != 0,
    )
    batches = Batches(dataset, range(start, run.plan.end_step), workers, prefetch, device)
    return on_device(iter(batches), device, finish, DeviceAugment(split.pictures, config.augment, size))


def train_batches(run: Resolved, shards: ShardSet, world: World, start: int) -> Batches:
    """This process's batches from global step `start` to the end of the run, as loader processes make them."""
    config = run.config
    size, channels = config.model.img_size, config.model.in_chans
    assert size is not None, "resolve fills in the image size"
    build = FastTransform if config.data.augment_by == "compiled" else build_train_transform
    dataset = StepDataset(
        shards,
        run.order,
        build(config.augment, size, channels),
        config.mix,
        size,
        channels,
        run.drop_paths,
        world.rank,
        world.size,
        token_options(run),
        finish=world.device.type != "cuda",
        replace_bad=config.data.max_bad_samples != 0,
    )
    steps = range(start, run.plan.end_step)
    # A copy of the order, since it keeps one epoch at a time, and fetching ahead may be in another one.
    samples_of = partial(_samples_of, copy(run.order), world.rank, world.size)
    source = fetched_ahead(dataset, shards, samples_of, steps.stop, _TRAIN_SHARE)
    return Batches(source, steps, loader_workers(config), config.data.prefetch, world.device)


def _samples_of(order: DataOrder, rank: int, world_size: int, step: int) -> np.ndarray:
    return order.step(step, rank, world_size).samples


def token_options(run: Resolved) -> TokenLabelOptions | None:
    """How the label maps of the tokens are read; None where the run needs none."""
    objective = run.config.objective
    if run.token_grid is None:
        return None
    return TokenLabelOptions(run.token_grid, objective.mix_token, objective.official_roi_order)


def eval_batches(config: RunConfig, world: World) -> Iterable[EvalBatch]:
    """This process's batches of the whole evaluation split; can be iterated again and again."""
    size, channels = config.model.img_size, config.model.in_chans
    assert size is not None and config.data.val is not None, "callers ask for evaluation only where there is a split"
    transform = build_eval_transform(config.eval_transform, config.augment, size, channels)
    shards = ShardSet(config.data.val, config.data.cache_options())
    dataset = EvalDataset(shards, transform, channels, config.eval.batch_size, world.rank, world.size)
    batches = eval_dataset_batches(dataset, loader_workers(config), config.data.prefetch, world)
    return KeptBatches(batches, world.device) if config.data.resident else batches


def eval_dataset_batches(dataset: EvalDataset, workers: int, prefetch: int, world: World) -> Batches:
    """All batches of an evaluation."""
    source = fetched_ahead(dataset, dataset.shards, dataset.samples_of, len(dataset), _EVAL_SHARE)
    return Batches(source, range(len(dataset)), workers, prefetch, world.device)


def try_samples(run: Resolved) -> None:
    """Put the first sample of every split through its transform.

    Raises:
        UserError: the pictures don't fit the crop, the image size or the channels of the config.
    """
    config = run.config
    assert config.model.img_size is not None, "resolve fills in the image size"
    size, channels = config.model.img_size, config.model.in_chans
    train = build_train_transform(config.augment, size, channels)
    evaluate = build_eval_transform(config.eval_transform, config.augment, size, channels)
    train(load_sample(training_shards(config), 0, channels).picture, config.seed, 0, 0)
    if config.data.val is not None:
        evaluate(load_sample(ShardSet(config.data.val), 0, channels).picture)


def loader_workers(config: RunConfig) -> int:
    """`data.workers`, but no more than this process's share of the usable cores; the data do not depend on it."""
    return min(config.data.workers, num_cores())


def check_same_command(run: Resolved, world: World) -> None:
    """Whether all processes were given the same run; collective. Each node has a launcher of its own.

    Raises:
        UserError: the message names the keys that differ, and the ranks on which they do.
    """
    own = flatten(run.config.model_dump(mode="json")) | {"shards of data.train": run.train.fingerprint()}
    own = {key: value for key, value in own.items() if key not in OWN_KEYS}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
    if len(set(world.gather(digest))) == 1:
        return
    given = world.gather(own)
    others = [rank for rank, other in enumerate(given) if other != given[0]]
    other = given[others[0]]
    differing = [key for key in sorted(given[0].keys() | other.keys()) if given[0].get(key) != other.get(key)]
    changes = "; ".join(f"{key}: {given[0].get(key)!r} there, {other.get(key)!r} here" for key in differing[:5])
    ranks = ", ".join(map(str, others[:8]))
    world.fail(f"rank 0 and rank {ranks} were started with different runs ({changes}); give all nodes the same command")
