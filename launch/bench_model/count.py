"""Floating-point operations and bytes of every operation of a model, on tensors without memory.

What it counts is a program without fusion: every operation reads its inputs from memory and writes its outputs to it,
weights included. Fused attention is one operation. A product of matrices counts two operations per multiply-add;
norms, activations and sums count none, but their bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

import pipeline.models.fused_mlp
import pipeline.models.short_attention  # noqa: F401  (operators that are counted)
from launch.bench_model.peaks import Peak

HALF = torch.bfloat16


@register_flop_formula([torch.ops.rookery.mlp_hidden, torch.ops.rookery.mlp_hidden_backward])
def _mlp_hidden(rows: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of `fused_mlp`'s kernels: a product each, (T, C) by (F, C) or (C, F)."""
    return 2 * rows[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.rookery.short_attention)
def _short_attention(qkv: Sequence[int], heads: int, kv_heads: int, *_: Any, **__: Any) -> int:
    """Two products for (B, N, (H + 2 H') D)."""
    return 4 * qkv[0] * qkv[1] ** 2 * qkv[2] * heads // (heads + 2 * kv_heads)


@register_flop_formula(torch.ops.rookery.short_attention_backward)
def _short_attention_backward(_grad: Sequence[int], qkv: Sequence[int], *heads: int, **__: Any) -> int:
    """Five, one of them once more."""
    return 5 * _short_attention(qkv, *heads) // 2


@dataclass(frozen=True)
class Counts:
    """Of a batch of one model, in half precision.

    Attributes:
        params: of the model.
        batch: images that the others are counted for.
        infer, train: (operations, bytes) of every operation of a forward pass, and of a forward and a backward pass.
        kinds: by phase, bytes of all operations of a kind (`aten::mm`), those that move most first.
    """

    params: int
    batch: int
    infer: list[tuple[int, int]]
    train: list[tuple[int, int]]
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Operations of one image's forward pass; a training step counts three times as many, recomputation none."""
        return sum(flops for flops, _ in self.infer) / self.batch

    def bytes(self, phase: str) -> float:
        """Of one image, in the phase `infer` or `train`."""
        return sum(moved for _, moved in getattr(self, phase)) / self.batch

    def bound(self, phase: str, peak: Peak) -> float:
        """Images per second if every operation took as long as its arithmetic or its memory traffic, the longer."""
        seconds = sum(
            max(flops / (1e12 * peak.half), moved / (1e12 * peak.bandwidth)) for flops, moved in getattr(self, phase)
        )
        return self.batch / seconds


def count(build: Callable[[], nn.Module], side: int, batch: int, train: bool = True) -> Counts:
    """Count what a model does with a batch of pictures.

    Args:
        build: makes the model.
        side: of the pictures, pixels.
        train: count a training as well.
    """
    model = build().to("meta", HALF)
    for module in model.modules():
        module._compiled_call_impl = None  # the operations are those of the program before any fusion
    images = torch.empty(batch, 3, side, side, device="meta", dtype=HALF)
    params = sum(p.numel() for p in model.parameters())
    model.eval()
    with torch.no_grad(), OperationCounter() as inference, _FlashAttention():
        model(images)
    training = OperationCounter()
    if train:
        model.train()
        with training, _FlashAttention():
            logits = model(images)
            F.cross_entropy(logits, torch.empty(batch, device="meta", dtype=torch.int64)).backward()
    kinds = {phase: one.bytes_by_name() for phase, one in (("infer", inference), ("train", training))}
    return Counts(params, batch, inference.operations, training.operations, kinds)


class OperationCounter(TorchDispatchMode):
    """Notes what is executed below autograd.

    Attributes:
        operations: (floating-point operations, bytes) of each.
        names: of each: `aten::mm`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[int, int]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func._schema.name in _NO_TRAFFIC:
            return out
        packet = func._overloadpacket
        flops = int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0
        given = {name: value for name, value in kwargs.items() if name != "out"}  # that one is written only
        read = args[1:] if func._schema.name in _FIRST_UNREAD else args
        tensors = [leaf for leaf in tree_leaves((read, given, out)) if isinstance(leaf, Tensor)]
        # A tensor that was expanded is read from the memory of the small one.
        moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
        self.operations.append((flops, moved))
        self.names.append(func._schema.name)
        return out

    def bytes_by_name(self) -> dict[str, int]:
        """Bytes of all operations of a name, those that move most first."""
        found: Counter[str] = Counter()
        for (_, moved), name in zip(self.operations, self.names, strict=True):
            found[name] += moved
        return dict(found.most_common())


_NO_TRAFFIC = {
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")
}
# Of their first argument they need the shape, or overwrite it.
_FIRST_UNREAD = {
    f"aten::{name}"
    for name in (
        *("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
        *("copy_", "zero_", "fill_", "bernoulli_", "uniform_", "normal_"),
    )
}


class _FlashAttention(TorchFunctionMode):
    """Takes the fused attention that a GPU has where it takes the input: of four dimensions, as its kernels demand."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].ndim != 4 or kwargs.get("attn_mask") is not None:
            return func(*args, **kwargs)
        return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
