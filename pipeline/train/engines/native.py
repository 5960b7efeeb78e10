"""What the engines share whose optimizer and loss scale are torch's own."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.models.batch_norm import group_statistics, update_groups
from pipeline.train.distributed import World
from pipeline.train.engines.base import PRECISIONS, Engine
from pipeline.train.optim import set_lr


class NativeEngine(Engine):
    """Autocast, loss scaling, clipping and the update; weights and optimizer states stay float32.

    A subclass sets `model` and `optimizer`, and keeps the average of the weights.

    Args:
        model: the plain model, already on the device and equal on all processes.
        config: the resolved run.
        world: this process among the others.
    """

    optimizer: torch.optim.AdamW

    def __init__(self, model: nn.Module, config: RunConfig, world: World) -> None:
        self.plain = model
        self.world = world
        self.dtype = PRECISIONS[config.train.precision]
        self.clip = config.train.clip_grad_norm
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.train.precision == "fp16")
        self.batch_norms = group_statistics(model, lane_chunk(config))

    def autocast(self) -> AbstractContextManager[None]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, self.dtype)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        set_lr(self.optimizer, lr)
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.plain.parameters() if p.grad is not None]
        norm = self._total_norm([p.grad for p in parameters if p.grad is not None])
        skipped = (~torch.isfinite(norm)).float()
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm, foreach=True)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # The fused update reads this flag on the device and leaves weights and moments alone when it is 1.
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_groups(self.batch_norms, skipped, sum_over_processes if self.world.size > 1 else None)
        self._update_average()
        return norm, skipped

    def _total_norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """2-norm over the gradients of all processes, the same on each; 0-D float32."""
        return torch.nn.utils.get_total_norm(grads, foreach=True)

    @abstractmethod
    def _update_average(self) -> None:
        """Move the average of the weights, if there is one, towards the weights."""


def lane_chunk(config: RunConfig) -> int:
    """Samples of a lane in a step: what BatchNorms take their statistics over, wherever the lane is read."""
    assert config.data.lanes is not None, "resolve fills in the lanes"
    return config.train.global_batch_size // config.data.lanes


def sum_over_processes(tensor: torch.Tensor) -> None:
    torch.distributed.all_reduce(tensor)
