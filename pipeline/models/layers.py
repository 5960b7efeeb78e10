"""Layers that several architectures share: MLP, the pre-norm encoder layers, running them, initial weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.drop_path import DropPath
from pipeline.models.errors import ModelError
from pipeline.models.fused_mlp import check_fused_mlp, fused_mlp
from pipeline.models.kernels import Kernels, takes
from pipeline.models.recomputed import recomputed
from pipeline.models.sum_norm import add_branch, sum_norm

Gelu = Literal["tanh", "erf"]


def gelu(kind: Gelu) -> nn.GELU:
    """GELU: `erf` is the exact form, `tanh` the approximation that JAX uses by default."""
    return nn.GELU(approximate="tanh" if kind == "tanh" else "none")


def hidden_width(dim: int, mlp_ratio: float) -> int:
    """Hidden channels of an MLP.

    Raises:
        ModelError: there would be none.
    """
    hidden = int(dim * mlp_ratio)
    if hidden < 1:
        raise ModelError(f"mlp_ratio={mlp_ratio!r} leaves an MLP of {dim} channels without hidden ones")
    return hidden


class Mlp(nn.Module):
    """Linear, GELU, dropout, linear, dropout: (..., C) -> (..., C).

    With `layer_scale` the output is multiplied by a learned vector (C,) of that initial value (LayerScale).

    With `kernels="triton"` GELU is a part of the products beside it, on a GPU and in half precision; see `fused_mlp`.

    Attributes:
        lean: in training, compute GELU's output again in the backward pass and don't keep it; see `set_lean`.

    Raises:
        ModelError: the kernels have no dropout.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: Gelu = "erf",
        drop: float = 0.0,
        layer_scale: float | None = None,
        kernels: Kernels = "torch",
    ) -> None:
        super().__init__()
        self.fused = kernels == "triton"
        if self.fused:
            check_fused_mlp(drop)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = gelu(act)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim)
        self.scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop2 = nn.Dropout(drop)
        self.lean = False

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:
        """With the bias of the second layer or, if kernels compute and the caller adds it, without."""
        x = self._by_kernels(x, bias) if self.fused and takes(x) else self._by_torch(x)
        return self.drop2(x if self.scale is None else x * self.scale)

    def _by_kernels(self, x: Tensor, bias: bool) -> Tensor:
        first, second = self.fc1, self.fc2
        last, tanh = second.bias if bias else None, self.act.approximate == "tanh"
        return fused_mlp(x, first.weight, first.bias, second.weight, last, tanh=tanh, lean=self.lean)

    def _by_torch(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        active = self.act(hidden)
        # A compiler decides by itself what it keeps.
        if self.lean and self.training and not self.drop1.p and not torch.compiler.is_compiling():
            hidden = hidden.detach()
            with recomputed(active, lambda: self.act(hidden)):
                return self.fc2(active)
        return self.fc2(self.drop1(active))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer: attention and MLP, each behind a LayerNorm and in a stochastic-depth branch.

    Args:
        dim: channels C.
        attn: (B, ..., N, C) -> same shape.
        mlp: (B, ..., N, C) -> same shape.
        drop_path: rate of both branches, which draw separately.
        norm_eps: epsilon of both LayerNorms.
        residual_scale: r of x + f(LN(r x)) / r, Refiner's form of both branches.

    If the MLP has this package's kernels, so have the residual sums and LayerNorms, on a GPU and in half precision; see
    `sum_norm`.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        *,
        drop_path: float,
        norm_eps: float,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        # LN(r x) with epsilon e is LN(x) with e / r², so that the input needs no scaled copy.
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps / residual_scale**2)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps / residual_scale**2)
        self.mlp = mlp
        self.drop_path2 = DropPath(drop_path)
        self.branch_scale = 1.0 / residual_scale
        self.fused = bool(getattr(mlp, "fused", False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., N, C) -> same shape."""
        if self.fused and takes(x):
            x, normed = sum_norm(x, self.norm1)
            return self.add_both(x, self.attn(normed, bias=False))
        return self.add_mlp(self.drop_path1(self.attn(self.norm1(x)), x, self.branch_scale))

    def add_mlp(self, x: Tensor) -> Tensor:
        """The second half of the layer."""
        return self.drop_path2(self.mlp(self.norm2(x)), x, self.branch_scale)

    def add_both(self, x: Tensor, branch: Tensor) -> Tensor:
        """Both sums by kernels; `branch` is that of the attention without the last bias."""
        attn: Any = self.attn
        mlp: Any = self.mlp
        factors, times = self.drop_path1.factors(x), self.branch_scale
        x, normed = sum_norm(x, self.norm2, branch, attn.proj.bias, factors, times)
        bias = mlp.fc2.bias if mlp.scale is None else None  # else it is scaled in the MLP
        return add_branch(x, mlp(normed, bias=bias is None), bias, self.drop_path2.factors(x), times)


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The encoder layers of a model, in the order of construction: what is sharded, recomputed and compiled as one.

    A layer of another library counts that was marked with `is_encoder_layer`.
    """
    return [m for m in model.modules() if isinstance(m, EncoderLayer) or getattr(m, "is_encoder_layer", False)]


class MapLayer(EncoderLayer):
    """An encoder layer whose attention (a `MapAttention`) takes attention maps from the layer before and passes on."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, **settings: float) -> None:
        super().__init__(dim, attn, mlp, **settings)
        mlp.lean = attn.lean

    def forward(self, x: Tensor, maps: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, ..., N, C) and the maps of the layer before -> the same shape and the maps for the next layer."""
        if self.fused and takes(x):
            x, normed = sum_norm(x, self.norm1)
            branch, maps = self.attn(normed, maps, bias=False)
            return self.add_both(x, branch), maps
        branch, maps = self.attn(self.norm1(x), maps)
        return self.add_mlp(self.drop_path1(branch, x, self.branch_scale)), maps


def run_layer(
    layer: nn.Module, x: Tensor, maps: Tensor | None, grad_checkpointing: bool
) -> tuple[Tensor, Tensor | None]:
    """Apply one encoder layer; with `grad_checkpointing` it keeps only its inputs and recomputes the rest later.

    Returns:
        The tokens, and the attention maps for the next layer: None after a layer that has none to give.
    """
    recompute = grad_checkpointing and torch.is_grad_enabled()
    if isinstance(layer, MapLayer):
        return checkpoint(layer, x, maps, use_reentrant=False) if recompute else layer(x, maps)
    return (checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)), None


def run_layers(layers: Iterable[nn.Module], x: Tensor, grad_checkpointing: bool) -> Tensor:
    """Apply encoder layers in turn, all on sequences of the same length."""
    maps = None
    for layer in layers:
        x, maps = run_layer(layer, x, maps, grad_checkpointing)
    return x


def normal_(param: Tensor, std: float) -> None:
    """Fill with a normal distribution.

    timm's `trunc_normal_` cuts at ±2, a hundred times the usual `std`, which is no cut at all.
    """
    if not param.is_meta:  # see truncated_normal_
        nn.init.normal_(param, std=std)


@torch.no_grad()
def truncated_normal_(param: Tensor, std: float) -> None:
    """Fill with a normal distribution of `std` cut at two standard deviations (the result's own is 0.88 `std`).

    Drawn by inverting the distribution function, as JAX does. PyTorch's `trunc_normal_` redraws whole tensors until
    every element is inside the cut, which took five times as long for the weights of NesT-T on one core.
    """
    if param.is_meta:
        return  # nothing to fill, and torch would import its compiler for seconds to say so
    inside = math.erf(math.sqrt(2.0))
    param.uniform_(-inside, inside).erfinv_().mul_(math.sqrt(2.0) * std).clamp_(-2 * std, 2 * std)
