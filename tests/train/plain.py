"""A training written out by hand: whole batches in one process, torch's own AdamW and clipping."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from pipeline.config_load import load_config
from pipeline.data.augment.mixing import apply_mix, soft_target_cross_entropy
from pipeline.data.loader import TrainBatch
from pipeline.data.shards import ShardSet
from pipeline.models import set_drop_path_noise
from pipeline.resolve import resolve
from pipeline.train.distributed import World
from pipeline.train.setup import initial_model, train_batches

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class PlainTraining:
    """The run of a recipe of `tests.train.conftest.write_recipe`."""

    def __init__(self, recipe: Path, precision: str = "fp32", lr_scale: float = 1.0, *overrides: str) -> None:
        self.run = resolve(load_config(recipe, list(overrides)), 1)
        self.model = initial_model(self.run.config, ALONE)
        self.precision, self.lr_scale = precision, lr_scale
        exempt = self.model.no_weight_decay()
        decay, levels = self.run.config.optim.layer_decay, len(self.model.levels)
        groups = [
            {
                "params": [parameter],
                "weight_decay": 0.0 if name in exempt else 0.05,
                "times": decay ** (levels + 1 - layer_of(name, levels)),
            }
            for name, parameter in self.model.named_parameters()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=self.run.config.optim.eps, fused=False, foreach=False)

    def batches(self) -> Iterator[TrainBatch]:
        return iter(train_batches(self.run, ShardSet(self.run.config.data.train), ALONE, 0))

    def step(self, step: int, batch: TrainBatch) -> float:
        """Train on a batch; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.schedule.lr(step) * self.lr_scale * group["times"]
        images, targets = apply_mix(batch.images, batch.labels, batch.mix, 10)
        set_drop_path_noise(self.model, batch.drop_path)
        with torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext():
            logits = self.model(images)
        loss = soft_target_cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.config.train.clip_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def copy(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weights and optimizer, to go back to."""
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def load(self, copied: tuple[dict[str, Any], dict[str, Any]]) -> None:
        model, optimizer = copy.deepcopy(copied)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


def layer_of(name: str, levels: int) -> int:
    """The layer of a parameter of a NesT that has one in each level, for the decay of the learning rate."""
    if name.startswith("patch_embed.") or name == "levels.0.pos_embed":
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("levels.") else levels + 1
