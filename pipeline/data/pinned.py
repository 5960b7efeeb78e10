"""Tensors of ordinary memory brought to a GPU without waiting for it."""

from __future__ import annotations

import torch


def brought(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, by way of pinned memory: a copy from ordinary memory waits until the GPU is done."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
