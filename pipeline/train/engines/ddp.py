"""Distributed data parallel: every process holds the whole model; gradients are averaged while backward runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.models.compiled import compile_model
from pipeline.train.distributed import World
from pipeline.train.engines.average import ModuleAverage, all_tensors
from pipeline.train.engines.native import NativeEngine
from pipeline.train.engines.whole import MOMENTS, WholeState
from pipeline.train.optim import make_optimizer
from pipeline.train.tasks import make_task

# The statistics of BatchNorms are summed once a step, here. The option has another name since torch 2.15.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


class DdpEngine(NativeEngine):
    """torch's `DistributedDataParallel`, or the bare model when there is one process.

    Args:
        model: the plain model, already on the device and equal on all processes.
        config: the resolved run.
        world: this process among the others.
    """

    def __init__(self, model: nn.Module, config: RunConfig, world: World) -> None:
        super().__init__(model, config, world)
        self.optimizer = make_optimizer(model, config.optim, config.optim.peak_lr(config.train.global_batch_size))
        self.compact, self.part_mb = config.checkpoint.compact, config.checkpoint.part_mb
        decay = config.train.ema_decay
        self.average = None if decay is None else ModuleAverage(deepcopy(model), decay, all_tensors)
        compile_model(model, config.train.compile)
        self.model = model
        if world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **_OWN_BUFFERS)
            self._settle_buckets(config)

    def accumulating(self) -> AbstractContextManager[None]:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def eval_model(self, weights: str) -> nn.Module:
        return self._averaged().module if weights == "ema" else self.plain

    def full_weights(self, weights: str) -> dict[str, torch.Tensor]:
        if not self.world.is_main:
            return {}
        return {k: v.detach().cpu() for k, v in self.eval_model(weights).state_dict().items()}

    def snapshot(self, planned: bool = True) -> Callable[[Path, World], None]:
        compact = self.compact and planned
        if compact:
            self._round_moments()
        if not self.world.is_main:
            return lambda directory, world: None
        average = None if self.average is None else copied(self.average.module.state_dict())
        updates = 0 if self.average is None else self.average.updates
        state = self.optimizer.state
        moments = {
            name: copied(state[p], torch.bfloat16 if compact else None)
            for name, p in self.plain.named_parameters()
            if p in state
        }
        whole = WholeState(copied(self.plain.state_dict()), moments, self.scaler.state_dict(), average, updates)
        return lambda directory, world: whole.write(directory, self.part_mb)

    def load(self, directory: Path) -> None:
        whole = WholeState.read(directory)
        try:
            self.plain.load_state_dict(whole.model)
        except RuntimeError as error:
            raise UserError(f"{directory}: the checkpoint is of another model: {error}") from error
        parameters = dict(self.plain.named_parameters())
        for name, moments in whole.moments.items():
            # The count of steps goes to the device as well: the update is fused.
            state = {key: value.to(self.world.device, copy=True) for key, value in moments.items()}
            self.optimizer.state[parameters[name]] = state
        if whole.scaler:
            self.scaler.load_state_dict(dict(whole.scaler))
        if self.average is not None:
            self.average.module.load_state_dict(whole.average(directory))
            self.average.updates = whole.averaged

    def _round_moments(self) -> None:
        """To what a compact checkpoint holds, on every process: a run must go on from what it would be resumed from."""
        for state in self.optimizer.state.values():
            for name in MOMENTS:
                state[name].copy_(state[name].to(torch.bfloat16))

    def _settle_buckets(self, config: RunConfig) -> None:
        """One throw-away backward, after which DDP arranges its buckets in the order in which gradients come.

        It would do so after the first step otherwise. Buckets decide in which order three or more processes add up a
        gradient, so the first step of a resumed run would round differently from that of an uninterrupted one.
        """
        micro_batch = config.train.global_batch_size // self.world.size // config.train.accumulate
        buffers = [buffer.clone() for buffer in self.plain.buffers()]
        with self.autocast():
            total = make_task(config).sum_of_outputs(self.model, micro_batch, self.world.device)
        total.backward()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.plain.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _update_average(self) -> None:
        if self.average is not None:
            self.average.update(self.plain)

    def _averaged(self) -> ModuleAverage:
        assert self.average is not None, "the config checks that eval.weights=ema comes with train.ema_decay"
        return self.average


def copied(state: Mapping[str, torch.Tensor], moments: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Copies on the CPU.

    Args:
        moments: type of AdamW's moments there; None: their own.
    """
    types = {name: moments if name in MOMENTS else None for name in state}
    return {n: tensor.detach().to("cpu", types[n] or tensor.dtype, copy=True) for n, tensor in state.items()}
