"""One evaluating process."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.augment.settings import EvalTransformConfig
from pipeline.data.augment.transforms import build_eval_transform
from pipeline.data.cache_room import CacheOptions
from pipeline.data.loader import Batches, EvalDataset
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.tracking.redact import redact
from pipeline.train.calibrate import Figures, Ratio, held_out, own_ratio, report, search, table, with_ratio
from pipeline.train.distributed import World
from pipeline.train.engines.base import PRECISIONS
from pipeline.train.eval_progress import watched
from pipeline.train.evaluate import evaluate, evaluate_parts
from pipeline.train.process import run_process
from pipeline.train.setup import eval_dataset_batches
from pipeline.train.trained import Trained

_PREFETCH = 4


@dataclass(frozen=True)
class EvalJob:
    """What to evaluate.

    Attributes:
        weights: directory with `model.safetensors` and `config.json`, or with `step` a checkpoint.
        data: directory of the split.
        run: run directory of the checkpoint.
        step: where the checkpoint was made; None for exported weights.
        batch_size: samples per process and forward.
        workers: loader processes of each process.
        precision: `fp32`, `bf16` or `fp16`.
        output: file that gets the JSON result too; empty for none.
        crop_pct: crop ratio; None leaves the run's own evaluation as it is.
        ratios: crop ratios to choose the best of; empty for a single evaluation.
        holdout: part of the samples that the choice is not made on.
        cache: of the node, for a split that has an address.
    """

    weights: str
    data: str
    run: str = ""
    step: int | None = None
    batch_size: int = 64
    workers: int = 2
    precision: str = "fp32"
    output: str = ""
    crop_pct: float | None = None
    ratios: list[float] = field(default_factory=list)
    holdout: float = 0.5
    cache: CacheOptions = field(default_factory=CacheOptions)


def run_job(job: EvalJob, world: World) -> dict[str, Any]:
    """Evaluate; collective. Rank 0 prints the result as one line of JSON.

    Raises:
        UserError: no such weights or data, the classes differ, or a crop ratio can't be used.
    """
    weights = Path(job.weights)
    trained = Trained.from_export(weights) if job.step is None else Trained.from_checkpoint(Path(job.run), weights)
    evaluation = _Evaluation(job, trained, world)
    result: dict[str, Any] = {"weights": job.weights, "data": redact(job.data)}
    if job.step is not None:
        result["step"] = job.step
    if job.ratios:
        result |= evaluation.calibrate()
    elif job.crop_pct is not None:
        ratio = job.crop_pct
        settings = world.on_main(lambda: with_ratio(trained.transform, ratio))
        result |= {"crop_pct": ratio, **evaluation.at(settings, "eval")}
    else:
        result |= evaluation.at(trained.transform, "eval")
    result["model"] = trained.name
    if world.is_main:
        print(json.dumps(result), flush=True)
        if job.output:
            _write(Path(job.output), result)
    return result


class _Evaluation:
    """Trained weights and a split, to be evaluated with one transform or several."""

    def __init__(self, job: EvalJob, trained: Trained, world: World) -> None:
        self.job, self.trained, self.world = job, trained, world
        self.shards = ShardSet(job.data, job.cache)
        if trained.classes != self.shards.manifest.classes:
            world.fail(
                f"{job.weights} tells other classes apart ({_few(trained.classes)}) than {job.data} has "
                f"({_few(self.shards.manifest.classes)}); evaluate on a split that belongs to the training data"
            )
        self.model = trained.model.to(world.device)
        dtype = PRECISIONS[job.precision]
        self.autocast = nullcontext() if dtype is None else torch.autocast(world.device.type, dtype)

    def at(self, settings: EvalTransformConfig, title: str) -> Figures:
        """Figures of the whole split; collective."""
        dataset = self._dataset(settings)
        return evaluate(self.model, watched(*self._batches(dataset, title)), self.autocast, self.world)[0]

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


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); choose another --output") from error


def payload(job: EvalJob) -> str:
    return json.dumps(asdict(job))


def run(text: str, threads: int | None = None) -> int:
    """Run the job that a JSON text describes; returns the exit status."""
    values = json.loads(text)
    job = EvalJob(**values | {"cache": CacheOptions(**values["cache"])})
    return run_process(lambda world: run_job(job, world), threads)
