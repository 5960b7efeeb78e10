"""What the loader gives where pictures are on the device already: plans, and evaluation batches that stay there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.data.augment.mixing import MixConfig, draw_mix
from pipeline.data.batches import Failed
from pipeline.data.loader import EvalBatch, TrainBatch, drop_path_uniforms
from pipeline.data.order import DataOrder
from pipeline.data.resident.plan import Planner
from pipeline.data.resident.split import Fault
from pipeline.data.shards import ShardSet
from pipeline.data.substitute import Replaced, Substitutes
from pipeline.errors import UserError


class PlanDataset(Dataset):
    """As `StepDataset`, with a plan in the place of images.

    Args:
        shards: the training split, asked for names of samples alone.
        labels: (N,) of all samples.
        faults: bad samples, for which others stand in as in `StepDataset`.
        order, mix, img_size, drop_paths, rank, world_size: as in `StepDataset`.
        planner: draws the plans.
        replace_bad: False: the first bad sample is an error.

    Raises:
        UserError: `world_size` does not divide the lanes, or a sample is bad and may not be replaced.
    """

    def __init__(
        self,
        shards: ShardSet,
        labels: np.ndarray,
        faults: dict[int, Fault],
        order: DataOrder,
        planner: Planner,
        mix: MixConfig,
        img_size: int,
        drop_paths: int,
        rank: int,
        world_size: int,
        replace_bad: bool,
    ) -> None:
        order.check_world_size(world_size)
        if faults and not replace_bad:
            raise next(iter(faults.values())).error()
        self.shards, self.labels, self.faults, self.order, self.planner = shards, labels, faults, order, planner
        self.mix, self.img_size, self.drop_paths = mix, img_size, drop_paths
        self.rank, self.world_size = rank, world_size
        self._samples: Substitutes[None] = Substitutes(order.shard_samples, order.seed, replace_bad)

    def __getitem__(self, step: int) -> TrainBatch | Failed:
        try:
            return self._batch(step)
        except UserError as error:
            return Failed.of(error)

    def _batch(self, step: int) -> TrainBatch:
        order, seed = self.order, self.order.seed
        chosen = order.step(step, self.rank, self.world_size)
        ids = chosen.samples + chosen.copies * order.num_samples
        used, replaced = chosen.samples.copy(), []
        for place in np.flatnonzero(np.isin(chosen.samples, list(self.faults))) if self.faults else ():
            sample = int(chosen.samples[place])
            used[place], _, fault = self._samples.load(sample, chosen.epoch, self._look)
            assert fault is not None, "faults are of bad samples"
            [by_key] = self.shards.keys([int(used[place])])
            replaced.append(Replaced(sample, fault.file, fault.key, fault.reason, int(used[place]), by_key))
        plan, erased = self.planner(seed, chosen.epoch, ids, used)
        return TrainBatch(
            images=torch.empty(0),
            labels=torch.from_numpy(self.labels[used]),
            samples=torch.from_numpy(used),
            drop_path=drop_path_uniforms(seed, chosen.epoch, ids, self.drop_paths),
            mix=draw_mix(self.mix, seed, step, chosen.lanes, order.chunk, self.img_size),
            erased=erased,
            replaced=replaced or None,
            plan=plan,
        )

    def _look(self, sample: int) -> None:
        if sample in self.faults:
            raise self.faults[sample].error()


class KeptBatches:
    """Evaluation batches that are loaded once and stay on the device; iterated again and again."""

    def __init__(self, batches: Iterable[EvalBatch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._kept: list[EvalBatch] | None = None

    def __iter__(self) -> Iterator[EvalBatch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        for batch in self._batches:
            kept.append(EvalBatch(*(tensor.to(self._device, non_blocking=True) for tensor in batch)))
            yield kept[-1]
        self._kept = kept
