"""Engines: ways to spread a model and its optimizer over the processes."""

from __future__ import annotations

from torch import nn

from pipeline.config import RunConfig
from pipeline.train.distributed import World
from pipeline.train.engines.base import Engine

__all__ = ["Engine", "make_engine"]


def make_engine(model: nn.Module, config: RunConfig, world: World) -> Engine:
    """The engine that `engine.name` asks for; its library is imported only then."""
    from pipeline.train.engines.ddp import DdpEngine

    return {"ddp": DdpEngine}[config.engine.name](model, config, world)
