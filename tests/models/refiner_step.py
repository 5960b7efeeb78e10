"""A training step of a refiner alone: what it leaves behind, how far two are apart, and what is kept meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.batch_norm import group_statistics, update_groups


def with_weights(refiner: nn.Module) -> nn.Module:
    """The refiner with weights far from their initial values."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in refiner.named_parameters():
        values = torch.rand(parameter.shape, generator=generator)
        # Weights of BatchNorms wide enough for ReLU6 to cut at both of its ends.
        parameter.data = 6 * values if "bn" in name and name.endswith("weight") else 4 * values - 2
    return refiner


def some_maps(batch: int, heads: int, rows: int, columns: int, contiguous: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    shape = (batch, heads, rows, columns) if contiguous else (rows, columns, batch, heads)
    maps = (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)
    return (maps if contiguous else maps.permute(2, 3, 0, 1)).clone(memory_format=torch.preserve_format)


def step(
    refiner: nn.Module, maps: Tensor, real: Tensor | None, group: int | None, above: Tensor | None = None
) -> dict[str, Tensor]:
    """Everything that a training step leaves behind; `above` is the gradient of the refined maps, drawn by default."""
    norms = group_statistics(refiner, group) if group else []
    leaf = maps.detach().requires_grad_()
    out = refiner(leaf, real)
    if above is None:
        above = torch.randn(out.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    (out * above.to(out)).sum().backward()
    if norms:
        update_groups(norms, torch.zeros((), device=maps.device), None)
    found = {"out": out.detach(), "maps": leaf.grad}
    found |= {name: p.grad for name, p in refiner.named_parameters()}
    return found | {name: b for name, b in refiner.named_buffers() if "running" in name or "tracked" in name}


def errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest errors over the largest value, of each."""
    assert got.keys() == wanted.keys()
    # Biases before a BatchNorm have no gradient but rounding, so the largest of all gradients is the measure.
    largest = max(float(t.abs().max()) for name, t in wanted.items() if "running" not in name)
    found = {}
    for name, value in wanted.items():
        assert got[name].shape == value.shape
        scale = max(float(value.abs().max()), 1e-3 * largest)
        # Never NaN, which Python's max passes over.
        found[name] = float((got[name] - value).abs().max().nan_to_num(nan=torch.inf)) / scale
    return found


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, error in errors(got, wanted).items():
        assert got[name].dtype == wanted[name].dtype
        # Running averages move by float32 factors in both.
        assert error < max(tolerance, 1e-6 if "running" in name else 0.0), f"{name}: off by {error:.2e}"


def kept_bytes(run: Callable[[], Any], at_least: int) -> int:
    """Of the tensors of some size that autograd keeps, each storage once, parameters not."""
    storages: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= at_least and not isinstance(tensor, nn.Parameter):
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(run())
    return sum(storages.values())
