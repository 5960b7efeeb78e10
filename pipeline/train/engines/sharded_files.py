"""Reading whole states from torch's distributed checkpoints (DCP), without a process group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def read_whole(directory: Path) -> dict[str, Any]:
    """What `FsdpEngine` wrote: the fields of `WholeState`.

    Raises:
        OSError, RuntimeError: the files are missing or damaged.
    """
    with as_runtime_error():
        reader = dcp.FileSystemReader(directory)
        flat = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry, TensorStorageMetadata)
            else None
            for name, entry in reader.read_metadata().state_dict_metadata.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(flat, storage_reader=reader, no_dist=True)
    moments: dict[str, dict[str, Any]] = {}
    for name, value in _below(flat, "moments").items():
        parameter, _, key = name.rpartition(".")
        moments.setdefault(parameter, {})[key] = value
    return {
        "model": _below(flat, "model"),
        "moments": moments,
        "scaler": _below(flat, "scaler"),
        "ema": _below(flat, "ema") or None,
        "averaged": flat["averaged"],
    }


def _below(flat: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(f"{prefix}."): v for name, v in flat.items() if name.startswith(f"{prefix}.")}


@contextmanager
def as_runtime_error() -> Iterator[None]:
    """DCP's error is no `Exception`, and nobody expects another kind."""
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"{reason} (on process {rank})") from error
