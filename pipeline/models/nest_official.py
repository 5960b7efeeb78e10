"""NesT weights as the official code stores them: flax paths, kernels with the input axes first.

Axes: d channels, h heads, e channels per head, T blocks, n tokens per block; convolution kernels are HWIO.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.models.attention import Attention
from pipeline.models.errors import ModelError
from pipeline.models.nest import Nest
from pipeline.models.official import OfficialFormat, Source, register_official

_PREFIX = "optimizer/target/"


def select(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The network's weights of a training checkpoint, without their prefix; other mappings unchanged."""
    if not any(name.startswith(_PREFIX) for name in tensors):
        return tensors
    return {name.removeprefix(_PREFIX): value for name, value in tensors.items() if name.startswith(_PREFIX)}


def sources(model: Nest) -> dict[str, Source]:
    """Every entry of the model's state dict and the flax tensors it comes from."""
    levels: Any = model.levels
    if model.refine is not None:
        raise ModelError("the official NesT refines no attention maps: set refine=null to load its weights")
    if any(level.aggregate.kind != "conv_pool" for level in levels[1:]):
        raise ModelError("the official NesT has aggregation=conv_pool only")
    plan = _conv("patch_embed", "PatchEmbedding_0/Conv_0", model.patch_embed)
    encoder_layer = 0
    for i, level in enumerate(levels):
        plan[f"levels.{i}.pos_embed"] = _same(f"PositionEmbedding_{i}/pos_embedding", level.pos_embed)
        if i:
            plan |= _conv(f"levels.{i}.aggregate.conv", f"ConvPool_{i - 1}/Conv_0", level.aggregate.conv)
            plan |= _norm(f"levels.{i}.aggregate.norm", f"ConvPool_{i - 1}/LayerNorm_0", level.aggregate.norm)
        for j, layer in enumerate(level.layers):
            ours, theirs = f"levels.{i}.layers.{j}", f"EncoderNDBlock_{encoder_layer}"
            plan |= _norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0", layer.norm1)
            plan |= _attention(f"{ours}.attn", theirs, layer.attn)
            plan |= _norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1", layer.norm2)
            plan |= _linear(f"{ours}.mlp.fc1", f"{theirs}/MlpBlock_0/Dense_0", layer.mlp.fc1)
            plan |= _linear(f"{ours}.mlp.fc2", f"{theirs}/MlpBlock_0/Dense_1", layer.mlp.fc2)
            encoder_layer += 1
    plan |= _norm("norm", "LayerNorm_0", model.norm)
    if isinstance(model.head, torch.nn.Linear):
        plan |= _linear("head", "Dense_0", model.head)
    return plan


def _same(theirs: str, ours: Tensor) -> Source:
    return Source({theirs: tuple(ours.shape)}, lambda t: t)


def _conv(ours: str, theirs: str, conv: torch.nn.Conv2d) -> dict[str, Source]:
    o, i, h, w = conv.weight.shape
    return {
        f"{ours}.weight": Source({f"{theirs}/kernel": (h, w, i, o)}, lambda kernel: kernel.permute(3, 2, 0, 1)),
        f"{ours}.bias": Source({f"{theirs}/bias": (o,)}, lambda bias: bias),
    }


def _linear(ours: str, theirs: str, linear: torch.nn.Linear) -> dict[str, Source]:
    o, i = linear.weight.shape
    return {
        f"{ours}.weight": Source({f"{theirs}/kernel": (i, o)}, lambda kernel: kernel.T),
        f"{ours}.bias": Source({f"{theirs}/bias": (o,)}, lambda bias: bias),
    }


def _norm(ours: str, theirs: str, norm: torch.nn.LayerNorm) -> dict[str, Source]:
    return {
        f"{ours}.weight": _same(f"{theirs}/scale", norm.weight),
        f"{ours}.bias": _same(f"{theirs}/bias", norm.bias),
    }


def _attention(ours: str, layer: str, attn: Attention) -> dict[str, Source]:
    d, h = attn.proj.in_features, attn.num_heads
    e = d // h
    if attn.multi_query:
        theirs = f"{layer}/MultiQueryAttention_0"
        kernels = {f"{theirs}/DenseGeneral_0/kernel": (d, h, e), f"{theirs}/Dense_0/kernel": (d, 2 * e)}
        biases = {f"{theirs}/DenseGeneral_0/bias": (h, e), f"{theirs}/Dense_0/bias": (2 * e,)}
    else:
        theirs = f"{layer}/MultiHeadAttention_0"
        kernels = {f"{theirs}/DenseGeneral_0/kernel": (d, h, e), f"{theirs}/DenseGeneral_1/kernel": (d, h, 2 * e)}
        biases = {f"{theirs}/DenseGeneral_0/bias": (h, e), f"{theirs}/DenseGeneral_1/bias": (h, 2 * e)}
    return {
        f"{ours}.qkv.weight": Source(kernels, lambda q, kv: torch.cat([t.flatten(1) for t in _qkv(q, kv)], dim=1).T),
        f"{ours}.qkv.bias": Source(biases, lambda q, kv: torch.cat([t.flatten() for t in _qkv(q, kv)])),
        f"{ours}.proj.weight": Source({f"{theirs}/proj_kernel": (h, e, d)}, lambda kernel: kernel.flatten(0, 1).T),
        f"{ours}.proj.bias": Source({f"{theirs}/bias": (d,)}, lambda bias: bias),
    }


def _qkv(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One official tensor holds keys and values: per head the keys' channels, then the values'."""
    k, v = kv.chunk(2, dim=-1)
    return q, k, v


register_official(Nest, OfficialFormat(sources, select))
