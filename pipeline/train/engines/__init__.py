"""Engines: ways to spread a model and its optimizer over the processes."""

from __future__ import annotations

from torch import nn

from pipeline.config import RunConfig
from pipeline.train.distributed import World
from pipeline.train.engines.base import Engine
from pipeline.train.engines.whole import saved_weights

__all__ = ["Engine", "make_engine", "saved_weights"]


def make_engine(model: nn.Module, config: RunConfig, world: World) -> Engine:
    """The engine that `engine.name` asks for; its library is imported only then."""
    return _engine(config.engine.name)(model, config, world)  # type: ignore[call-arg]


def _engine(name: str) -> type[Engine]:
    if name == "fsdp":
        from pipeline.train.engines.fsdp import FsdpEngine

        return FsdpEngine
    if name == "deepspeed":
        from pipeline.train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine
    from pipeline.train.engines.ddp import DdpEngine

    return {"ddp": DdpEngine}[name]
