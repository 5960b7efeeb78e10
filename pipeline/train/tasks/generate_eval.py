"""`rookery eval` of a generator: FID and Inception score against a split."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config_load import parse_tree
from pipeline.data.augment.transforms import build_eval_transform
from pipeline.data.loader import EvalDataset
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.generate.figures import Judge
from pipeline.resolve import training_shards
from pipeline.tracking.run_dir import CONFIG_NAME, RunDir
from pipeline.train.distributed import World
from pipeline.train.engines.base import PRECISIONS
from pipeline.train.eval_progress import watched
from pipeline.train.setup import eval_dataset_batches
from pipeline.train.tasks.generate_saved import load_generator

if TYPE_CHECKING:
    from pipeline.train.eval_worker import EvalJob

_PREFETCH = 4


def evaluate_saved(job: EvalJob, world: World) -> tuple[dict[str, Any], None]:
    """See `GenerateTask.evaluate_saved`."""
    from pipeline.train.tasks.generate import feature_net

    if job.ratios or job.crop_pct is not None:
        raise UserError("crop ratios are for classifiers; leave out --crop-pct and --calibrate for task=generate")
    if job.aux_weight is not None:
        raise UserError("--aux-weight is of a Refiner's aux head; leave it out for task=generate")
    folder = Path(job.run) if job.run else Path(job.weights).parent
    saved = RunDir.saved_config(folder)
    if saved is None:
        raise UserError(
            f"{job.weights}: features and latents of a generator's evaluation are those of its run, and "
            f"{folder / CONFIG_NAME} is not there; name the run directory"
        )
    config = parse_tree(saved, str(folder / CONFIG_NAME))
    generator = load_generator(Path(job.weights)).generator.to(world.device)
    judge = Judge(feature_net(config, training_shards(config, job.cache), folder, world), world)
    transform = build_eval_transform(config.eval_transform, config.augment, generator.img_size, generator.channels)
    shards = ShardSet(job.data, job.cache)
    dataset = EvalDataset(shards, transform, generator.channels, job.batch_size, world.rank, world.size)
    batches = eval_dataset_batches(dataset, job.workers, _PREFETCH, world)
    judge.judge_split(watched(batches, "eval", job.batch_size * world.size, len(shards), world.is_main))
    dtype = PRECISIONS[job.precision]
    autocast = nullcontext() if dtype is None else torch.autocast(world.device.type, dtype)
    assert config.task.kind == "generate"
    figures = judge.judge(generator, config.task.samples, job.batch_size, autocast)
    return {**figures, "model": config.model.name}, None
