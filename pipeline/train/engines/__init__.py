"""Engines: ways to spread a model and its optimizer over the processes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.train.distributed import World
from pipeline.train.engines.base import Engine

__all__ = ["Engine", "make_engine", "saved_weights"]


def make_engine(model: nn.Module, config: RunConfig, world: World) -> Engine:
    """The engine that `engine.name` asks for; its library is imported only then."""
    return _engine(config.engine.name)(model, config, world)  # type: ignore[call-arg]


def saved_weights(engine: str, checkpoint: Path, weights: str) -> dict[str, torch.Tensor]:
    """All weights in a checkpoint that an engine of this name saved, on the CPU; see `Engine.saved_weights`."""
    return _engine(engine).saved_weights(checkpoint, weights)


def _engine(name: str) -> type[Engine]:
    if name == "deepspeed":
        from pipeline.train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine
    from pipeline.train.engines.ddp import DdpEngine

    return {"ddp": DdpEngine}[name]
