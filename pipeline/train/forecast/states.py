"""Memory of one process of many for weights, gradients, moments and average, by engine.

The engines that torch has are built, with their own sharding code, on tensors without memory (the meta device) and, for
`fsdp`, in a process group of the full size that talks to nobody. What they keep is then counted. DeepSpeed can't be
built that way; its partitions are counted from the parameters by its rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import accumulate, chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.train.distributed import World
from pipeline.train.engines.average import all_tensors
from pipeline.train.engines.ddp import DdpEngine
from pipeline.train.engines.deepspeed_setup import BUCKET, SMALL
from pipeline.train.engines.native import NativeEngine
from pipeline.train.forecast.storages import storage_bytes
from pipeline.train.optim import parameter_groups
from pipeline.train.tasks import make_task

_FLOAT = 4
# ZeRO 1 and 2 pad the flat piece of a group of parameters so that every process's part is a multiple of this.
_ALIGNMENT = 2


@dataclass(frozen=True)
class States:
    """Bytes of one process, at the end of a backward pass, when everything is there.

    Attributes:
        weights: parameters and buffers; with DeepSpeed's stages 1 to 3 its second copy of this process's part too.
        gradients: as they wait for the update. `ddp` averages them in place: they lie in its buckets.
        moments: AdamW's, and its count of steps.
        average: of the weights (`train.ema_decay`).
        communication: on top of these, while gradients and weights travel. `fsdp`: weights and gradients of what lies
            between the layers and of the layer at work, the weights of the layer that is fetched meanwhile and
            the gradient that is sent. `deepspeed`: its buckets, of which one is filled while the other is sent; stage
            1 also has every gradient for a while, and stage 3 the layer at work. NCCL's own buffers are not counted.

    What is offloaded to the host's memory is not counted.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    communication: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def count_states(config: RunConfig, rank: int, world_size: int) -> States:
    """What process `rank` of `world_size` keeps.

    With `fsdp` there must not be a process group yet.

    Args:
        config: of a resolved run.
    """
    config = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    model = make_task(config).build_model("meta")
    if config.engine.name == "fsdp":
        return _fsdp(model, config, rank, world_size)
    if config.engine.name == "deepspeed" and config.engine.zero_stage:
        return _zero(model, config, rank, world_size)
    # Every process has everything, so that one alone tells. ZeRO 0 averages in buckets of its own.
    engine = DdpEngine(model, config, World(0, 1, 0, torch.device("cpu")))
    average = [] if engine.average is None else all_tensors(engine.average.module)
    buckets = BUCKET * _FLOAT if config.engine.name == "deepspeed" else 0
    return States(*_updated(engine), storage_bytes(average), buckets)


def _fsdp(model: nn.Module, config: RunConfig, rank: int, world_size: int) -> States:
    from pipeline.train.engines.fsdp import FsdpEngine

    with _silent_group(rank, world_size):
        engine = FsdpEngine(model, config, World(rank, world_size, 0, torch.device("cpu")))
        average = [] if engine.average is None else _kept(engine.average.module)
        root, *layers = (storage_bytes(own) * world_size for own in _units(model))
        largest = max(layers, default=0)
        return States(*_updated(engine), storage_bytes(average), 2 * root + 4 * largest)


@contextmanager
def _silent_group(rank: int, world_size: int) -> Iterator[None]:
    """A process group of any size in which nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _updated(engine: NativeEngine) -> tuple[int, int, int]:
    """Bytes of weights, gradients and moments, after a backward pass and an update."""
    for parameter in engine.plain.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in engine.optimizer.param_groups:
        # The fused update has no form without memory; its moments are the same.
        group["fused"] = group["foreach"] = False
    engine.optimizer.step()
    moments = chain.from_iterable(state.values() for state in engine.optimizer.state.values())
    # A gradient that FSDP has scattered is padded as its parameter is.
    return storage_bytes(_kept(engine.plain)), storage_bytes(engine.plain.parameters()), storage_bytes(moments)


def _kept(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _units(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters that FSDP gathers together: what is left to the model itself, then each layer's."""
    from torch.distributed.fsdp import FSDPModule

    layers = [list(m.parameters()) for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
    taken = {id(parameter) for layer in layers for parameter in layer}
    return [[p for p in model.parameters() if id(p) not in taken], *layers]


def _zero(model: nn.Module, config: RunConfig, rank: int, world_size: int) -> States:
    stage = config.engine.zero_stage
    parameters = dict(model.named_parameters())
    sizes = [[parameters[name].numel() for name in group.names] for group in parameter_groups(model, config.optim)]
    whole = sum(map(sum, sizes))
    buffers = storage_bytes(model.buffers())
    if stage == 3:
        # Cut one by one, each rounded up; small ones are kept whole as well, once they have been gathered.
        part = sum(-(-size // world_size) for group in sizes for size in group)
        weights = 2 * part + sum(size for group in sizes for size in group if size <= SMALL)
        gradients, average = part, part
    else:
        parts = [_ALIGNMENT * -(-sum(group) // (_ALIGNMENT * world_size)) for group in sizes]
        part = sum(parts)
        weights = part * world_size + part
        gradients = sum(_touched(group, rank, size, world_size) for group, size in zip(sizes, parts, strict=True))
        average = whole
    moments = 2 * part + len(sizes)
    if config.engine.offload_optimizer:
        weights, gradients, moments = weights - part, 0, 0
    return States(
        weights=weights * _FLOAT + buffers,
        gradients=gradients * _FLOAT,
        moments=moments * _FLOAT,
        average=0 if config.train.ema_decay is None else average * _FLOAT + buffers,
        communication=2 * BUCKET * _FLOAT,
    )


def _touched(group: list[int], rank: int, part: int, world_size: int) -> int:
    """Elements of the parameters that a process's part of a group reaches into: ZeRO keeps their gradients whole."""
    ends = list(accumulate(group))
    start, end = rank * part, (rank + 1) * part
    padding = part * world_size - ends[-1] if rank == world_size - 1 else 0
    return padding + sum(size for size, stop in zip(group, ends, strict=True) if stop > start and stop - size < end)
