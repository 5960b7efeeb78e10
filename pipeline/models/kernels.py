"""Kernels of this package in place of PyTorch's: the models' option `kernels`, and where Triton's can run."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.models.errors import ModelError

Kernels = Literal["torch", "triton"]
# Triton runs kernels in Python where this is set, on the CPU too: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# For operators that put their inputs in order themselves: a compiler would copy views of other operators' results.
FREE_LAYOUT = (torch.Tag.flexible_layout,)


def runs_here(x: Tensor) -> bool:
    """Whether Triton's kernels can work on this tensor; elsewhere (on a CPU) the same is computed by PyTorch."""
    return x.is_cuda or (INTERPRETED and x.is_cpu)


def takes(x: Tensor) -> bool:
    """Whether kernels for half precision alone can work on this tensor: for the others there are no tensor cores."""
    return runs_here(x) and (INTERPRETED or computed_in(x).itemsize == 2)


def computed_in(x: Tensor) -> torch.dtype:
    """The type that autocast, where it is on, takes for a product with this tensor."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def asked_for(options: Mapping[str, Any]) -> bool:
    """Whether a model's options have Triton's kernels, at their top or in one of them (`refine`)."""
    inner = (value for value in options.values() if isinstance(value, Mapping))
    return options.get("kernels") == "triton" or any(map(asked_for, inner))


@contextmanager
def launching(x: Tensor) -> Iterator[None]:
    """On the device of a tensor; Triton launches on the current one, whatever the tensors are on.

    Raises:
        ModelError: a kernel needs more of a processor than it has.
    """
    try:
        with torch.cuda.device_of(x) if x.is_cuda else nullcontext():
            yield
    except Exception as error:
        if type(error).__name__ != "OutOfResources":  # Triton's, which need not be there
            raise
        kind = str(x.dtype).removeprefix("torch.")
        mend = "train in half precision, or leave it out" if x.dtype.itemsize > 2 else "leave it out"
        raise ModelError(f"kernels=triton: too large for this GPU in {kind} ({error}); {mend}") from error


def triton_module(name: str) -> ModuleType:
    """A module of `pipeline.models` that needs Triton: this takes a second, and a CPU, without use for it, may lack it.

    Raises:
        ModelError: there is no Triton.
    """
    try:
        return importlib.import_module(f"pipeline.models.{name}")
    except ImportError as error:
        raise ModelError(f"kernels=triton: the package triton can't be imported ({error}); install it") from error
