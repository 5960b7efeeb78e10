"""Softmax self-attention: the fused form, and the form with explicit maps that Refiner works on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.block_attention import HEAD_DIMS, TOKENS, block_attention
from pipeline.models.errors import ModelError, check_heads
from pipeline.models.kernels import Kernels, runs_here
from pipeline.models.refine_group import as_typed
from pipeline.models.short_attention import check_attention_kernels, short_attention, takes_short


class Attention(nn.Module):
    """Softmax self-attention over the second last axis; every leading axis is a batch axis.

    The leading axes are folded into one: PyTorch's fused attention kernels accept (batch, heads, tokens, channels)
    only, and an input with more axes falls back to the unfused path.

    With `multi_query` all heads share one key and one value (NesT on CIFAR); `qkv` then projects to
    `dim + 2 * dim / num_heads` channels, laid out as q of every head, k, v.

    With `kernels="triton"` a GPU takes `block_attention` for sequences of 16 or 64 tokens, and for others of up to 256
    `short_attention`, in place of PyTorch's kernels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        multi_query: bool = False,
        kernels: Kernels = "torch",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(num_heads, dim, "the embedding width")
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.multi_query = multi_query
        self.kernels = kernels
        if kernels == "triton":
            check_attention_kernels(attn_drop)
        self.kv_heads = 1 if multi_query else num_heads
        self.attn_drop = attn_drop
        self.widths = (dim, head_dim, head_dim) if multi_query else (dim, dim, dim)
        self.qkv = nn.Linear(dim, sum(self.widths))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:
        """(..., N, C) -> (..., N, C), with the bias of the last projection or, if the caller adds it, without."""
        if self.kernels == "triton":
            out = self._by_kernels(x)
            if out is not None:
                return self.proj_drop(projection(self.proj, out.view(x.shape), bias))
        projected = self.qkv(x.flatten(0, -3))
        q, k, v = projected.split(self.widths, dim=-1)
        q = split_heads(q, self.num_heads)
        if self.multi_query:
            k, v = (t.unsqueeze(1).expand(-1, self.num_heads, -1, -1) for t in (k, v))
        else:
            k, v = (split_heads(t, self.num_heads) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(projection(self.proj, out.transpose(1, 2).reshape(x.shape), bias))

    def _by_kernels(self, x: Tensor) -> Tensor | None:
        """What goes into the last projection, (B', N, C); None: that is for PyTorch."""
        x, head_dim = x.flatten(0, -3), self.widths[0] // self.num_heads
        if x.shape[-2] in TOKENS and head_dim in HEAD_DIMS:
            return block_attention(self.qkv(x), self.num_heads, self.kv_heads) if runs_here(x) else None
        if takes_short(x, head_dim):
            return short_attention(x, self.qkv.weight, self.qkv.bias, self.num_heads, self.kv_heads)
        return None

    def maps(self, x: Tensor) -> Tensor:
        """The attention maps that the fused kernel doesn't show, softmax(q kᵀ / √d): (..., N, C) -> (B', H, N, N)."""
        q, k, _ = self.qkv(x.flatten(0, -3)).split(self.widths, dim=-1)
        q = split_heads(q, self.num_heads)
        k = k.unsqueeze(1) if self.multi_query else split_heads(k, self.num_heads)
        return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)


class MapAttention(nn.Module):
    """Self-attention with explicit attention maps, which may be refined and handed from layer to layer.

    A layer that is not `shared` computes maps from its own queries and keys, A = softmax(q kᵀ / √d), adds the maps it
    was handed times 1 / √d if it is to `accumulate` (Refiner's code), refines the sum if it has a refiner, applies
    them to its values and hands them on. A `shared` layer has no queries and keys: it refines and applies the maps it
    was handed, and hands these on as they came.

    Refiner, arXiv 2106.03714; official file `models/refined_transformer.py`, class Refined_Attention.

    Args:
        dim: channels C.
        num_heads: heads H.
        refiner: (B, H, N, N) -> (B, H', N, N), with `out_maps` = H'; the values are split into H' heads. None: as is.
        shared: take the maps of the layer before.
        accumulate: add the maps of the layer before.
        multi_query: one key and one value for all heads.
        attn_drop, proj_drop: dropout of the maps (before the refiner) and after the projection.

    Attributes:
        lean: in training, maps are of autocast's type as soon as they exist, not float32 at first; see `set_lean`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        refiner: nn.Module | None,
        *,
        shared: bool = False,
        accumulate: bool = False,
        multi_query: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(num_heads, dim, "the embedding width")
        head_dim = dim // num_heads
        value_dim = head_dim if multi_query else dim
        self.num_heads = num_heads
        self.value_heads = num_heads if refiner is None else int(refiner.out_maps)  # type: ignore[arg-type]
        if self.value_heads != num_heads and (multi_query or dim % self.value_heads):
            raise ModelError(
                f"without the reduction {dim} channels of values must be split into {self.value_heads} heads, one per "
                "expanded map: choose refine.expansion so that they divide, attention=mha, or refine.reduction=true"
            )
        self.shared = shared
        self.accumulate = accumulate
        self.multi_query = multi_query
        self.scale = head_dim**-0.5
        self.widths = (value_dim,) if shared else (dim, value_dim, value_dim)
        self.qkv = nn.Linear(dim, sum(self.widths))
        self.attn_drop = nn.Dropout(attn_drop)
        self.refiner = refiner
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.lean = False

    def forward(self, x: Tensor, maps: Tensor | None = None, bias: bool = True) -> tuple[Tensor, Tensor]:
        """(..., N, C) and the maps of the layer before, (B, H, N, N) -> (..., N, C) and the maps for the next.

        With `bias=False` the caller adds that of the last projection.
        """
        projected = self.qkv(x.flatten(0, -3))
        if self.shared:
            assert maps is not None, "a layer that shares maps follows one that has them"
            value, passed, used = projected, maps, self._refine(maps)
        else:
            query, key, value = projected.split(self.widths, dim=-1)
            passed = used = self._refine(self.attn_drop(self._own_maps(query, key, maps)))
        v = value.unsqueeze(1) if self.multi_query else split_heads(value, self.value_heads)
        out = (used @ v).transpose(1, 2).reshape(x.shape)
        return self.proj_drop(projection(self.proj, out, bias)), passed

    def _own_maps(self, query: Tensor, key: Tensor, before: Tensor | None) -> Tensor:
        # Half of the scale on either side: in half precision the product of unscaled ones may overflow.
        q = split_heads(query, self.num_heads) * self.scale**0.5
        k = (key.unsqueeze(1) if self.multi_query else split_heads(key, self.num_heads)) * self.scale**0.5
        likeness = q @ k.transpose(-2, -1)
        if self.lean and self.training:
            # Autocast would have the result in float32, and in half precision once more for what comes next.
            with as_typed(likeness):
                maps = torch.softmax(likeness, dim=-1)
                return maps if before is None or not self.accumulate else maps.add(before, alpha=self.scale)
        maps = torch.softmax(likeness, dim=-1)
        return maps if before is None or not self.accumulate else maps + self.scale * before

    def _refine(self, maps: Tensor) -> Tensor:
        return maps if self.refiner is None else self.refiner(maps)


def projection(layer: nn.Linear, x: Tensor, bias: bool) -> Tensor:
    """A linear layer, with its bias or without: then it isn't called as a module, around which hooks would act."""
    return layer(x) if bias else F.linear(x, layer.weight)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
