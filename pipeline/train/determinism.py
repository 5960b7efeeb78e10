"""Kernels that give the same numbers each time."""

from __future__ import annotations

import torch


def use_deterministic_kernels(wanted: bool) -> None:
    """`train.deterministic`, for this process.

    torch then fills new memory with NaN as well, so that what is read before it is written shows. Nothing here reads
    such memory, and to fill it is another pass through memory for many tensors.
    """
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
