"""Classification of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from data_prep.manifest import Manifest
from data_prep.store import is_remote
from pipeline.config import RunConfig
from pipeline.data.loader import EvalBatch, TrainBatch
from pipeline.data.order import DataOrder
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.explain.gradcat import check_tree
from pipeline.models import ImageModel, model_info, num_drop_paths, set_drop_path_noise
from pipeline.models.facts import count_macs
from pipeline.resolve import Resolved, build_model, continues, training_shards, updated
from pipeline.tracking.confusion import Confusion
from pipeline.train.distributed import World
from pipeline.train.evaluate import evaluate
from pipeline.train.init_weights import check_init
from pipeline.train.objective import Objective, Targets, check_objective, forward, sum_of_outputs
from pipeline.train.setup import device_batches, eval_batches, initial_model, try_samples
from pipeline.train.state import Best
from pipeline.train.step import StepResult, train_step
from pipeline.train.tasks.base import Task, Work
from pipeline.wording import counted

if TYPE_CHECKING:
    from pipeline.train.engines import Engine
    from pipeline.train.eval_worker import EvalJob
    from pipeline.train.predictions import Predictions


class ClassifyTask(Task):
    """Pictures in shards, a registered architecture, cross-entropy of classes (and of tokens: `objective`)."""

    kind = "classify"
    unit = "img"
    best = Best("top1", "max")
    figures = ("top1", "top5", "loss")

    def splits(self) -> tuple[Manifest, Manifest | None]:
        val = self.config.data.val
        return training_shards(self.config).manifest, None if val is None else ShardSet(val).manifest

    def fit(self, train: Manifest, val: Manifest | None) -> tuple[RunConfig, nn.Module]:
        config = updated(self.config, model={"num_classes": self.config.model.num_classes or train.num_classes})
        _check_classes(config, train, val)
        _check_cache(config, train, val)
        model = build_model(config, "meta")
        _check_explain(config, model)
        if config.model.init is not None and not continues(config):
            check_init(model, config.model, train.classes)
        return updated(config, model={"img_size": model.img_size}), model

    def check(self, model: nn.Module, train: Manifest, order: DataOrder, world_size: int) -> dict[str, Any]:
        image_model = cast(ImageModel, model)
        _check_mixing(self.config, order, world_size)
        grid = check_objective(self.config, image_model, train, order, world_size)
        return {"drop_paths": num_drop_paths(model), "token_grid": grid}

    def build_model(self, device: str | torch.device) -> ImageModel:
        return build_model(self.config, device)

    def macs(self, model: nn.Module) -> int:
        return count_macs(cast(ImageModel, model))

    def summary(self, train: Manifest) -> str:
        classes = train.num_classes
        return f"at {self.config.model.img_size} px, {classes:,} class{'' if classes == 1 else 'es'}"

    def paper(self) -> str:
        return model_info(self.config.model.name).paper

    def try_samples(self, run: Resolved) -> None:
        try_samples(run)

    def initial_model(self, world: World, resumed: bool = False) -> nn.Module:
        return initial_model(self.config, world, resumed)

    def sum_of_outputs(self, model: nn.Module, samples: int, device: torch.device) -> Tensor:
        return sum_of_outputs(model, torch.zeros(self.input_shape(samples), device=device), self.config.objective)

    def sample_loss(
        self,
        run: Resolved,
        model: nn.Module,
        samples: int,
        device: torch.device,
        autocast: AbstractContextManager[None],
    ) -> Tensor:
        images = torch.empty(self.input_shape(samples), device=device)
        set_drop_path_noise(model, torch.empty(samples, run.drop_paths, device=device))
        objective = Objective(self.config.objective, run.train.num_classes, run.token_grid)
        with autocast:
            output = forward(model, images, objective.request())
        classes = torch.empty(samples, run.train.num_classes, device=device)
        tokens = getattr(output, "tokens", None)
        targets = Targets(classes, None if tokens is None else torch.empty_like(tokens, dtype=torch.float32))
        return objective.loss(output, targets)[0]

    def input_shape(self, samples: int) -> tuple[int, ...]:
        size = self.config.model.img_size
        assert size is not None, "resolve fills in the image size"
        return samples, self.config.model.in_chans, size, size

    def begin(self, run: Resolved, world: World) -> ClassifyWork:
        return ClassifyWork(run, world)

    def describe(self, classes: list[str], figures: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        return {
            "model": config.model.name,
            "overrides": config.model.overrides(),
            "figures": figures,
            "classes": classes,
            "augment": config.augment.model_dump(mode="json"),
            "eval_transform": config.eval_transform.model_dump(mode="json"),
        }

    @classmethod
    def evaluate_saved(cls, job: EvalJob, world: World) -> tuple[dict[str, Any], Predictions | None]:
        from pipeline.train.tasks.classify_eval import evaluate_saved

        return evaluate_saved(job, world)


class ClassifyWork(Work):
    """Batches of the loaders, `train_step`, top-1 and top-5."""

    source: ShardSet

    def __init__(self, run: Resolved, world: World) -> None:
        from pipeline.train.explained import Explainer

        super().__init__(run, world)
        config = run.config
        self.source = training_shards(config, config.data.cache_options())
        self.explainer = Explainer(run, world)
        self.objective = Objective(config.objective, run.train.num_classes, run.token_grid)

    def train_batches(self, start: int) -> Iterator[TrainBatch]:
        return device_batches(self.run, self.source, self.world, start)

    def step(self, engine: Engine, batch: TrainBatch, lr: float) -> StepResult:
        return train_step(engine, batch, lr, self.run.config.train.accumulate, self.objective, self.world.device)

    def eval_batches(self) -> Iterable[EvalBatch] | None:
        return None if self.run.val is None else eval_batches(self.run.config, self.world)

    def evaluate(
        self, model: nn.Module, batches: Iterable[EvalBatch], autocast: AbstractContextManager[None]
    ) -> tuple[dict[str, float], Confusion | None]:
        return evaluate(model, batches, autocast, self.world)

    def evaluated(self, step: int, engine: Engine) -> None:
        self.explainer.draw(step, engine)


def _check_classes(config: RunConfig, train: Manifest, val: Manifest | None) -> None:
    if train.num_classes < 2:
        raise UserError(
            f"data.train={config.data.train} has a single class, so there is nothing to tell apart; prepare it from "
            "the folder that holds the folders of classes"
        )
    classes = config.model.num_classes
    if classes != train.num_classes:
        raise UserError(
            f"model.num_classes={classes}, but data.train={config.data.train} has {train.num_classes} classes; "
            "leave model.num_classes out, or point data.train at the matching shards"
        )
    if val is not None and val.classes != train.classes:
        pairs = enumerate(zip_longest(train.classes, val.classes))
        number, named = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        theirs, own = ("is missing" if name is None else f"is {name!r}" for name in named)
        raise UserError(
            f"data.val={config.data.val} has other classes than data.train={config.data.train} "
            f"({counted(val.num_classes, 'class')} and {counted(train.num_classes, 'class')}): number {number} {own} "
            f"in data.val and {theirs} in data.train; prepare both splits from the same class list"
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


def _check_explain(config: RunConfig, model: ImageModel) -> None:
    if config.explain.images:
        try:
            check_tree(model)
        except UserError as error:
            raise UserError(f"explain.images={config.explain.images}: {error}; set explain.images=0") from error


def _check_mixing(config: RunConfig, order: DataOrder, world_size: int) -> None:
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
