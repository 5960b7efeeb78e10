"""Fully sharded data parallel (FSDP2): every process holds its part of weights, gradients, moments and average.

Each encoder layer is gathered just before it computes, in forward and again in backward, and its gradients go back to
their owners as means over the processes. What lies between the layers (stem, positions, aggregation, heads) is one more
such unit.

Weights are gathered, and gradients reduced, in float32, and bf16 and fp16 are autocast's, as with the `ddp` engine: the
operations and so the losses are those of one process. FSDP's own mixed precision would gather bfloat16 copies, half the
bytes, and also run LayerNorms and residual sums in bfloat16: another model.

A checkpoint is torch's distributed one (DCP): each process writes its shards, any number of processes reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only

from pipeline.config import RunConfig
from pipeline.models.compiled import compile_model
from pipeline.models.layers import encoder_layers
from pipeline.train.distributed import World
from pipeline.train.engines.average import ModuleAverage
from pipeline.train.engines.native import NativeEngine
from pipeline.train.engines.sharded_files import as_runtime_error
from pipeline.train.engines.whole import WholeState
from pipeline.train.optim import make_optimizer


class FsdpEngine(NativeEngine):
    """torch's `fully_shard` around every encoder layer and the model; on one process too.

    Args:
        model: the plain model, already on the device and equal on all processes; it is sharded in place.
        config: the resolved run.
        world: this process among the others.
        mesh: the processes, as `open_mesh` gives them; None: opened here.
    """

    def __init__(self, model: nn.Module, config: RunConfig, world: World, mesh: DeviceMesh | None = None) -> None:
        super().__init__(model, config, world)
        mesh = mesh or open_mesh(world)
        decay = config.train.ema_decay
        self.average = None
        if decay is not None:
            # Copied before it is sharded: FSDP can't copy a sharded module.
            self.average = ModuleAverage(deepcopy(model), decay, _local_tensors)
            _shard(self.average.module, mesh)
        self.model = model
        self._sharded = _shard(model, mesh)
        self.optimizer = make_optimizer(model, config.optim, config.optim.peak_lr(config.train.global_batch_size))
        # FSDP gathers a layer's weights in hooks around it, which no compiled code can contain.
        compile_model(model, "layers" if config.train.compile else False, hooked=True)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self._sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._sharded.set_requires_gradient_sync(True)

    def eval_model(self, weights: str) -> nn.Module:
        return self._averaged().module if weights == "ema" else self.plain

    def full_weights(self, weights: str) -> dict[str, torch.Tensor]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_model_state_dict(self.eval_model(weights), options=options)
        return cast(dict[str, torch.Tensor], gathered) if self.world.is_main else {}

    def snapshot(self, planned: bool = True) -> Callable[[Path, World], None]:
        state = self._state(copied=True)

        def write(directory: Path, world: World) -> None:
            with as_runtime_error():
                dcp.save(state, checkpoint_id=directory, process_group=world.group)

        return write

    def load(self, directory: Path) -> None:
        try:
            if WholeState.is_in(directory):
                self._load_whole(WholeState.read(directory), directory)
            else:
                self._load_sharded(directory)
        except (OSError, RuntimeError, KeyError) as error:
            self.world.fail(f"{directory}: the checkpoint is of another model: {error}", agreed=False)

    def _load_sharded(self, directory: Path) -> None:
        state = self._state()
        with as_runtime_error():
            reader = dcp.FileSystemReader(directory)
            _check_names(reader, state["model"])
            dcp.load(state, storage_reader=reader)
        # Tensors of models are read in place; numbers, and what the optimizer keeps by itself, are not.
        self._set_moments(state["moments"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.updates = state["averaged"]

    def _load_whole(self, whole: WholeState, directory: Path) -> None:
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.plain, dict(whole.model), options=options)
        if whole.moments:
            self._set_moments(whole.moments, options)
        if whole.scaler:
            self.scaler.load_state_dict(dict(whole.scaler))
        if self.average is not None:
            set_model_state_dict(self.average.module, dict(whole.average(directory)), options=options)
            self.average.updates = whole.averaged

    def _set_moments(self, moments: Mapping[str, Any], options: StateDictOptions | None = None) -> None:
        groups = get_optimizer_state_dict(self.plain, self.optimizer)["param_groups"]
        state: dict[str, Any] = {"state": dict(moments), "param_groups": groups}
        set_optimizer_state_dict(self.plain, self.optimizer, state, options=options)

    def _total_norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        norm = super()._total_norm(grads)
        assert isinstance(norm, DTensor)
        return norm.full_tensor()

    def _update_average(self) -> None:
        if self.average is not None:
            self.average.update(self.plain)

    def _averaged(self) -> ModuleAverage:
        assert self.average is not None, "the config checks that eval.weights=ema comes with train.ema_decay"
        return self.average

    def _state(self, copied: bool = False) -> dict[str, Any]:
        """The fields of `WholeState`; its tensors are those of the engine itself or shards of them, or copies."""
        options = StateDictOptions(cpu_offload=copied)
        state: dict[str, Any] = {
            "model": get_model_state_dict(self.plain, options=options),
            "moments": get_optimizer_state_dict(self.plain, self.optimizer, options=options)["state"],
            "scaler": self.scaler.state_dict(),
            "averaged": 0,
        }
        if self.average is not None:
            state["ema"] = get_model_state_dict(self.average.module, options=options)
            state["averaged"] = self.average.updates
        if copied and self.world.device.type == "cpu":
            # To the CPU is then no copy yet.
            state = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), state)
        return state


def _local_tensors(model: nn.Module) -> list[torch.Tensor]:
    """This process's shards of the parameters, then the buffers, which every process has whole."""
    shards = [cast(DTensor, parameter.detach()).to_local() for parameter in model.parameters()]
    return [*shards, *model.buffers()]


def open_mesh(world: World) -> DeviceMesh:
    """All processes in a row."""
    if not dist.is_initialized():
        # FSDP talks to a process group even where there is nobody else.
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(world.device.type, (world.size,))


def _shard(model: nn.Module, mesh: DeviceMesh) -> FSDPModule:
    """Shard in place; returns the model, which is an `FSDPModule` now."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        # torch cuts the first dimension and pads the parts to equal size. A position embedding has length 1 there: it
        # would be one process's alone, and padding would gather it as often as there are processes.
        if parameter.ndim == 0 or parameter.shape[0] >= mesh.size():
            return None
        even = [dim for dim, size in enumerate(parameter.shape) if size % mesh.size() == 0]
        return Shard(even[-1]) if even else None

    units = encoder_layers(model)
    # Always resharded: weights that stay whole after an evaluation would not see the next update.
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, shard_placement_fn=placement)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True, shard_placement_fn=placement)


def _check_names(reader: dcp.FileSystemReader, model: dict[str, Any]) -> None:
    """DCP reads what it is asked for and is silent about what else there is.

    Raises:
        RuntimeError: the checkpoint's model has weights that this one lacks.
    """
    prefix = "model."
    names = {n.removeprefix(prefix) for n in reader.read_metadata().state_dict_metadata if n.startswith(prefix)}
    if more := sorted(names - model.keys()):
        raise RuntimeError(f"it has {', '.join(more[:5])}{', ...' if len(more) > 5 else ''}")
