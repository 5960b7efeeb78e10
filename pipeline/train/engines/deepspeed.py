"""DeepSpeed's ZeRO: optimizer state, gradients and weights cut into parts, one for every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.models.batch_norm import group_statistics, update_groups
from pipeline.models.compiled import compile_model
from pipeline.train.distributed import World
from pipeline.train.engines.average import Average
from pipeline.train.engines.base import PRECISIONS, Engine
from pipeline.train.engines.ddp import copied
from pipeline.train.engines.deepspeed_setup import deepspeed_config, gather_whole, import_deepspeed
from pipeline.train.engines.loss_scale import LossScale
from pipeline.train.engines.native import lane_chunk, sum_over_processes
from pipeline.train.engines.whole import WholeState
from pipeline.train.engines.zero import partition
from pipeline.train.optim import make_optimizer, set_lr


class DeepSpeedEngine(Engine):
    """ZeRO stage `engine.zero_stage` of the deepspeed package.

    Weights, gradients and moments are fp32, and lower precision is torch's autocast, as in the `ddp` engine: losses are
    the same as there. DeepSpeed's own `torch_autocast` would average the gradients of linear layers in bf16, and its
    `bf16` would train bf16 weights.

    A checkpoint has the whole state in one file, in the format of the `ddp` engine, not DeepSpeed's one file for each
    process. So any engine, stage and number of processes goes on from it, stage 0 too, which DeepSpeed's universal
    checkpoints leave out.

    Unlike `ddp`, `step` waits for the device: DeepSpeed decides on the host whether to skip.

    Args:
        model: the plain model, already on the device and equal on all processes.
        config: the resolved run.
        world: this process among the others.

    Raises:
        UserError: the package is missing.
    """

    def __init__(self, model: nn.Module, config: RunConfig, world: World) -> None:
        deepspeed = import_deepspeed(config, world)
        if not dist.is_initialized():  # DeepSpeed wants a group of one process too
            backend = "nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.plain = model
        self.world = world
        self.stage = config.engine.zero_stage
        self.dtype = PRECISIONS[config.train.precision]
        self.clip = config.train.clip_grad_norm
        self.scale = LossScale(enabled=config.train.precision == "fp16")
        optimizer = make_optimizer(model, config.optim, config.optim.peak_lr(config.train.global_batch_size))
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.stepped = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
        self.average = self.averaged = None
        if config.train.ema_decay is not None:
            # Copied now: once ZeRO 3 has cut the model up, it can't be copied any more.
            self.averaged = deepcopy(model).requires_grad_(False)
            self.average = _Average(config.train.ema_decay, {} if self.stage == 3 else self.averaged.state_dict())
            if self.stage == 3:
                self.averaged.cpu()
        self.batch_norms = group_statistics(model, lane_chunk(config))
        if self.stage == 3:
            gather_whole(model)
        compile_model(model, config.train.compile, hooked=True)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=_Autocast(model, self.autocast), optimizer=optimizer, config=deepspeed_config(config, world)
        )
        self.model = self.engine
        self.engine.set_gradient_accumulation_boundary(True)
        self.parts = partition(self.engine)
        self.parameters = dict(model.named_parameters())

    def autocast(self) -> AbstractContextManager[None]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        if self.stage == 0:
            loss = loss * self.scale.value
        else:
            self.optimizer.loss_scale = self.scale.value
        self.engine.backward(loss, scale_wrt_gas=False)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        set_lr(self.optimizer, lr)
        norm, skipped = self._step_whole() if self.stage == 0 else self._step_parts()
        self.scale.update(skipped)
        flag = torch.tensor(float(skipped), device=self.world.device)
        update_groups(self.batch_norms, flag, sum_over_processes if self.world.size > 1 else None)
        if self.average is not None:
            self.average.update(self._live())
        return norm, flag

    def eval_model(self, weights: str) -> nn.Module:
        if weights != "ema":
            # Only DeepSpeed's wrapper gathers what ZeRO 3 has cut up.
            return self.model if self.stage == 3 else self.plain
        assert self.averaged is not None, "the config checks that eval.weights=ema comes with train.ema_decay"
        if self.stage < 3:
            return self.averaged
        whole = deepcopy(self.averaged).to(self.world.device)
        whole.load_state_dict(self._state_dict(self._average_values()))
        return whole

    def full_weights(self, weights: str) -> dict[str, Tensor]:
        values = self._average_values() if weights == "ema" else self._live()
        whole = self._state_dict(values)
        return {k: v.cpu() for k, v in whole.items()} if self.world.is_main else {}

    def snapshot(self, planned: bool = True) -> Callable[[Path, World], None]:
        model, moments = copied(self.full_weights("model")), self._moments()
        average = None if self.average is None else copied(self.full_weights("ema"))
        if not self.world.is_main:
            return lambda directory, world: None
        updates = 0 if self.average is None else self.average.updates
        whole = WholeState(model, moments, self.scale.state_dict(), average, updates)
        return lambda directory, world: whole.write(directory)

    def load(self, directory: Path) -> None:
        whole = WholeState.read(directory)
        try:
            self._check_shapes(whole.model)
            with self._writable():
                self.plain.load_state_dict(whole.model)
            self.parts.weights_are_set()
            if whole.moments:
                self.parts.set_moments([(p, whole.moments[name]) for name, p in self.stepped.items()])
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{directory}: the checkpoint is of another model: {error}") from error
        self.scale.load_state_dict(whole.scaler)
        if self.average is not None:
            saved = whole.average(directory)
            self.average.updates = whole.averaged
            for name, live in self._live().items():
                part = self._cut(name, saved[name]).to(live.device, copy=True)
                self.average.values.setdefault(name, part).copy_(part)

    def _step_whole(self) -> tuple[Tensor, bool]:
        """ZeRO 0 leaves the optimizer as it is, and skipping to us."""
        gradients = [p.grad for p in self.stepped.values() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / self.scale.value)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if not torch.isfinite(norm):
            self.engine.zero_grad()
            return norm, True
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.stepped.values(), self.clip, norm, foreach=True)
        self.engine.step()
        return norm, False

    def _step_parts(self) -> tuple[Tensor, bool]:
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.world.device)
        return norm, bool(self.optimizer.overflow)

    def _live(self) -> dict[str, Tensor]:
        """This process's part of what `state_dict` of the plain model has."""
        buffers = {k: v for k, v in self.plain.state_dict().items() if k not in self.parameters}
        return {k: self.parts.part(p) for k, p in self.parameters.items()} | buffers

    def _average_values(self) -> dict[str, Tensor]:
        assert self.average is not None, "the config checks that eval.weights=ema comes with train.ema_decay"
        return self.average.values or self._live()

    def _state_dict(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from the parts in the form of `_live`; collective."""
        parameters = self.parameters
        return {k: self.parts.whole(v, parameters[k]) if k in parameters else v for k, v in values.items()}

    def _cut(self, name: str, whole: Tensor) -> Tensor:
        return self.parts.cut(whole, self.parameters[name]) if name in self.parameters else whole

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """Copies of AdamW's state of every parameter, on the CPU of rank 0; collective."""
        moments = {}
        for name, parameter in self.stepped.items():
            state = self.parts.moments(parameter)
            if state and self.world.is_main:
                moments[name] = copied(state)
        return moments

    def _check_shapes(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if weights[name].shape != shape:
                raise RuntimeError(f"{name} is {tuple(weights[name].shape)} there, {tuple(shape)} here")

    def _writable(self) -> AbstractContextManager[None]:
        if self.stage < 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(list(self.plain.parameters()), modifier_rank=0)


class _Autocast(nn.Module):
    """A model that goes into autocast by itself: DeepSpeed leaves the caller's, on a GPU."""

    def __init__(self, module: nn.Module, autocast: Any) -> None:
        super().__init__()
        self.module = module
        self.autocast = autocast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.autocast():
            return self.module(*args, **kwargs)


class _Average(Average):
    """The average of the part of the weights that this process has.

    Attributes:
        values: where the average is kept, by name; what is not there is added by the first update.
    """

    def __init__(self, decay: float, values: dict[str, Tensor]) -> None:
        super().__init__(decay)
        self.values = values

    @torch.no_grad()
    def update(self, live: dict[str, Tensor]) -> None:
        if self.updates == 0:
            for name, value in live.items():
                self.values.setdefault(name, value.clone())
        self.move([self.values[name] for name in live], list(live.values()))
