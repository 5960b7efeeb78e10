"""HVT, Refiner and DeiT weights as the official code stores them: PyTorch state dicts whose names differ a little."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pipeline.models.deit import Deit
from pipeline.models.errors import ModelError
from pipeline.models.hvt import Hvt
from pipeline.models.official import OfficialFormat, Source, register_official
from pipeline.models.refiner import Refiner

_REFINER_NAMES = {
    ".attn.refiner.adapt_bn.": ".attn.adapt_bn.",
    ".attn.refiner.expand.": ".attn.DLA.conv_exp.",
    ".attn.refiner.local.": ".attn.DLA.depth_sep_conv.",
    ".attn.refiner.reduce.": ".attn.DLA.conv_pro.",
    ".attn.refiner.": ".attn.DLA.",
    ".mlp.scale": ".mlp.scale_channel",
}
# Where training scripts keep the weights, the averaged ones first.
_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def select(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The network's weights of a training checkpoint, without the prefix of a wrapper; other mappings unchanged."""
    for holder in _HOLDERS:
        if isinstance(tensors.get(holder), Mapping):
            tensors = tensors[holder]
            break
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _renamed(model: nn.Module, rename: Callable[[str], str]) -> dict[str, Source]:
    return {
        ours: Source({rename(ours): tuple(tensor.shape)}, lambda t: t) for ours, tensor in model.state_dict().items()
    }


def hvt_sources(model: Hvt) -> dict[str, Source]:
    """Every entry of the model's state dict and the official one it comes from."""
    if model.refine is not None or model.pool_options.kind != "max" or model.cls_token is not None:
        raise ModelError("the official HVT has max-pools, no class token and refines no attention maps")
    return _renamed(model, lambda name: re.sub(r"^pools\.", "blocks.", name))


def refiner_sources(model: Refiner) -> dict[str, Source]:
    """Every entry of the model's state dict and the official one it comes from."""
    if model.refine is None or model.refine.flavour != "official" or model.pooled_layers:
        raise ModelError("the official weights are for flavour=official without a pool")
    return _renamed(model, _refiner_name)


def _refiner_name(name: str) -> str:
    for ours, theirs in _REFINER_NAMES.items():
        if ours in name:
            return name.replace(ours, theirs)
    return name


def deit_sources(model: Deit) -> dict[str, Source]:
    """Every entry of the model's state dict and the official one it comes from."""
    return _renamed(model, lambda name: name.removeprefix("vit."))


register_official(Hvt, OfficialFormat(hvt_sources, select))
register_official(Refiner, OfficialFormat(refiner_sources, select))
register_official(Deit, OfficialFormat(deit_sources, select))
