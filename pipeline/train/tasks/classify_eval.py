"""`rookery eval` of a picture classifier: one evaluation, or the search for the best crop ratio."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.data.augment.settings import EvalTransformConfig
from pipeline.data.augment.transforms import build_eval_transform
from pipeline.data.loader import Batches, EvalDataset
from pipeline.data.shards import ShardSet
from pipeline.models.refiner import Refiner
from pipeline.train.calibrate import Figures, Ratio, held_out, own_ratio, report, search, table, with_ratio
from pipeline.train.distributed import World
from pipeline.train.engines.base import PRECISIONS
from pipeline.train.eval_progress import watched
from pipeline.train.evaluate import evaluate, evaluate_parts
from pipeline.train.predictions import Answers, Predictions, short
from pipeline.train.setup import eval_dataset_batches
from pipeline.train.trained import Trained

if TYPE_CHECKING:
    from pipeline.train.eval_worker import EvalJob

_PREFETCH = 4


def evaluate_saved(job: EvalJob, world: World) -> tuple[dict[str, Any], Predictions | None]:
    """See `ClassifyTask.evaluate_saved`."""
    weights = Path(job.weights)
    trained = Trained.from_export(weights) if job.step is None else Trained.from_checkpoint(Path(job.run), weights)
    if job.aux_weight is not None:
        if not isinstance(trained.model, Refiner) or trained.model.aux_head is None:
            world.fail(f"--aux-weight: {trained.name} of {job.weights} has no aux head; leave it out", agreed=False)
        trained.model.aux_weight = job.aux_weight
    evaluation = _Evaluation(job, trained, world)
    answers = Answers() if job.predictions else None
    if job.ratios:
        result = evaluation.calibrate()
    elif job.crop_pct is not None:
        ratio = job.crop_pct
        settings = world.on_main(lambda: with_ratio(trained.transform, ratio))
        result = {"crop_pct": ratio, **evaluation.at(settings, "eval", answers)}
    else:
        result = evaluation.at(trained.transform, "eval", answers)
    weighed = {} if job.aux_weight is None else {"aux_weight": job.aux_weight}
    return {**weighed, **result, "model": trained.name}, None if answers is None else evaluation.predictions(answers)


class _Evaluation:
    """Trained weights and a split, to be evaluated with one transform or several."""

    def __init__(self, job: EvalJob, trained: Trained, world: World) -> None:
        self.job, self.trained, self.world = job, trained, world
        self.shards = ShardSet(job.data, job.cache)
        if trained.classes != self.shards.manifest.classes:
            world.fail(
                f"{job.weights} tells other classes apart ({_few(trained.classes)}) than {job.data} has "
                f"({_few(self.shards.manifest.classes)}); evaluate on a split that belongs to the training data",
                agreed=False,
            )
        self.model = trained.model.to(world.device)
        dtype = PRECISIONS[job.precision]
        self.autocast = nullcontext() if dtype is None else torch.autocast(world.device.type, dtype)

    def at(self, settings: EvalTransformConfig, title: str, answers: Answers | None = None) -> Figures:
        """Figures of the whole split, and into `answers` what they count; collective."""
        dataset = self._dataset(settings)
        return evaluate(self.model, watched(*self._batches(dataset, title)), self.autocast, self.world, answers)[0]

    def predictions(self, answers: Answers) -> Predictions:
        """What was predicted, with the keys of the samples; collective."""
        labels, predicted, probabilities = answers.read(self.world, len(self.shards))
        classes = self.trained.classes

        def rows() -> Iterator[tuple[str, str, str, float]]:
            keys = self.shards.keys(range(len(self.shards)))
            for key, label, answer, probability in zip(keys, labels, predicted, probabilities, strict=True):
                yield key, classes[label], classes[answer], short(probability)

        return Predictions(("key", "label", "prediction", "probability"), rows)

    def calibrate(self) -> dict[str, Any]:
        """Search the job's ratios, and the run's own; collective. Rank 0 prints the table on standard error."""
        job, own = self.job, own_ratio(self.trained.transform)
        ratios = sorted({*job.ratios, *([] if own is None else [own])})
        settings, part_of = self.world.on_main(lambda: self._search_plan(ratios))

        def measure(ratio: float) -> tuple[Figures, list[Figures]]:
            title = f"crop ratio {ratio:g} ({ratios.index(ratio) + 1} of {len(ratios)})"
            if part_of is None:
                figures = self.at(settings[ratio], title)
                return figures, [figures]
            dataset = self._dataset(settings[ratio])
            batches = watched(*self._batches(dataset, title))
            return evaluate_parts(self.model, batches, _dealt(part_of, dataset), self.autocast, self.world)

        def say(ratio: Ratio) -> None:
            if self.world.is_main:
                print(f"crop ratio {ratio.crop_pct:g}: top1 {ratio.search['top1']:.4f}", file=sys.stderr, flush=True)

        results = search(ratios, measure, say)
        if self.world.is_main:
            print(table(results, own), file=sys.stderr, flush=True)
        return report(results, own, job.holdout)

    def _search_plan(self, ratios: list[float]) -> tuple[dict[float, EvalTransformConfig], np.ndarray | None]:
        """The transform of every ratio, and which samples are held out."""
        settings = {ratio: with_ratio(self.trained.transform, ratio) for ratio in ratios}
        if not self.job.holdout:
            return settings, None
        return settings, held_out(self.shards.keys(range(len(self.shards))), self.job.holdout)

    def _dataset(self, settings: EvalTransformConfig) -> EvalDataset:
        trained, world = self.trained, self.world
        transform = build_eval_transform(settings, trained.augment, trained.img_size, trained.in_chans)
        return EvalDataset(self.shards, transform, trained.in_chans, self.job.batch_size, world.rank, world.size)

    def _batches(self, dataset: EvalDataset, title: str) -> tuple[Batches, str, int, int, bool]:
        batches = eval_dataset_batches(dataset, self.job.workers, _PREFETCH, self.world)
        return batches, title, self.job.batch_size * self.world.size, len(self.shards), self.world.is_main


def _dealt(part_of: np.ndarray, dataset: EvalDataset) -> list[torch.Tensor]:
    """Parts of the samples as the dataset deals them out: (b,) int64 for each of its batches, 0 in the padding."""
    whole = np.zeros((len(dataset), dataset.world_size, dataset.batch_size), dtype=np.int64)
    whole.reshape(-1)[: len(part_of)] = part_of
    return list(torch.from_numpy(whole[:, dataset.rank].copy()))


def _few(classes: list[str]) -> str:
    return f"{len(classes)}: {', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''}"
