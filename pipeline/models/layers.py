"""Layers that several architectures share: attention, MLP, the pre-norm encoder layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.drop_path import DropPath
from pipeline.models.errors import ModelError

Gelu = Literal["tanh", "erf"]


def gelu(kind: Gelu) -> nn.GELU:
    """GELU: `erf` is the exact form, `tanh` the approximation that JAX uses by default."""
    return nn.GELU(approximate="tanh" if kind == "tanh" else "none")


class Attention(nn.Module):
    """Softmax self-attention over the second last axis; every leading axis is a batch axis.

    The leading axes are folded into one: PyTorch's fused attention kernels accept (batch, heads, tokens, channels)
    only, and an input with more axes falls back to the unfused path.

    With `multi_query` all heads share one key and one value (NesT on CIFAR); `qkv` then projects to
    `dim + 2 * dim / num_heads` channels, laid out as q of every head, k, v.
    """

    def __init__(
        self, dim: int, num_heads: int, *, multi_query: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ModelError(f"{num_heads} heads don't divide {dim} channels: change num_heads or the embedding width")
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.multi_query = multi_query
        self.attn_drop = attn_drop
        self.widths = (dim, head_dim, head_dim) if multi_query else (dim, dim, dim)
        self.qkv = nn.Linear(dim, sum(self.widths))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., N, C) -> (..., N, C)."""
        q, k, v = self.qkv(x.flatten(0, -3)).split(self.widths, dim=-1)
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (batch, heads, N, head_dim)
        if self.multi_query:
            k, v = (t.unsqueeze(1).expand(-1, self.num_heads, -1, -1) for t in (k, v))
        else:
            k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


class Mlp(nn.Module):
    """Linear, GELU, dropout, linear, dropout: (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden: int, *, act: Gelu = "erf", drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = gelu(act)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer: attention and MLP, each behind a LayerNorm and in a stochastic-depth branch.

    Args:
        dim: channels C.
        attn: (B, ..., N, C) -> same shape.
        mlp: (B, ..., N, C) -> same shape.
        drop_path: rate of both branches, which draw separately.
        norm_eps: epsilon of both LayerNorms.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, *, drop_path: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = mlp
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., N, C) -> same shape."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def run_layers(layers: Iterable[nn.Module], x: Tensor, grad_checkpointing: bool) -> Tensor:
    """Apply `layers` in turn; with `grad_checkpointing` each keeps only its input and recomputes the rest later."""
    recompute = grad_checkpointing and torch.is_grad_enabled()
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    return x


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
