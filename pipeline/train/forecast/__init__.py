"""What a run will need, found out on one CPU before it is started: memory of a process, shapes, what it reads."""

from __future__ import annotations

from pipeline.train.forecast.activations import Activations, count_activations
from pipeline.train.forecast.reading import NodeBytes, Reading, count_node_bytes, count_reading
from pipeline.train.forecast.states import States, count_states
from pipeline.train.forecast.wire import count_wire

__all__ = [
    "Activations",
    "NodeBytes",
    "Reading",
    "States",
    "count_activations",
    "count_node_bytes",
    "count_reading",
    "count_states",
    "count_wire",
]
