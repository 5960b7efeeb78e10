"""Attention maps for looking at: kept by forward hooks while a `with` block lasts.

Fused attention never has its maps in memory. A hook computes them a second time, from the layer's input, in plain
operations; the layer itself runs as always, and nothing of it stays when the hooks are gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.attention import Attention, MapAttention
from pipeline.models.layers import EncoderLayer


@dataclass
class LayerMaps:
    """The maps of one layer.

    Attributes:
        before: (B, H, N, N) as the softmax gives them, or as handed on by the layer before.
        after: (B, H', N, N) as refined, which the values are multiplied with; None where nothing is refined.
    """

    before: Tensor
    after: Tensor | None = None


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The encoder layers in their order; a layer has an attention `attn`."""
    from timm.models.vision_transformer import Block

    return [module for module in model.modules() if isinstance(module, EncoderLayer | Block)]


@contextmanager
def kept_maps(model: nn.Module) -> Iterator[list[LayerMaps]]:
    """Keep the maps of every encoder layer of the forward passes inside, in the order of the layers.

    They are detached from the graph. In a NesT every block of the image is a sequence of its own, B' = B * T.
    """
    kept: list[LayerMaps] = []
    hooks = []
    try:
        for layer in encoder_layers(model):
            attention: Any = layer.attn
            refiner = getattr(attention, "refiner", None)
            hooked, keep = (attention, _keep) if refiner is None else (refiner, _keep_refined)
            hooks.append(hooked.register_forward_hook(partial(keep, kept)))
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _keep(kept: list[LayerMaps], attention: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    maps = output[1] if isinstance(attention, MapAttention) else _computed_again(attention, inputs[0])
    kept.append(LayerMaps(maps.detach()))


def _keep_refined(kept: list[LayerMaps], _refiner: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    kept.append(LayerMaps(inputs[0].detach(), output.detach()))


def _computed_again(attention: Any, x: Tensor) -> Tensor:
    if isinstance(attention, Attention):
        return attention.maps(x)
    # timm's, which DeiT has: (B, N, 3 * H * d)
    query, key, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    return torch.softmax(query * attention.scale @ key.transpose(-2, -1), dim=-1)
