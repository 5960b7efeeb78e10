"""NesT weights to and from timm's `nest_*_jx` models.

timm's forward pass merges the heads with the head index fastest, so the input columns of its `attn.proj` are
interleaved: with H heads of E channels, column e·H + h there is column h·E + e here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from pipeline.models.errors import ModelError
from pipeline.models.nest import Nest

# our name -> timm's; the rest is called the same.
_RENAMES = (("patch_embed.", "patch_embed.proj."), (".layers.", ".transformer_encoder."), (".aggregate.", ".pool."))
_PROJ = re.compile(r"levels\.(\d+)\.layers\.\d+\.attn\.proj\.weight")


def to_timm(model: Nest) -> dict[str, Tensor]:
    """State dict for the timm model of the same size, e.g. `nest_tiny` -> timm's `nest_tiny_jx`.

    timm computes the exact GELU where the official code approximates it; logits differ by some 1e-4 unless the model
    was built with `gelu="erf"`.

    Raises:
        ModelError: a multi-query model, which timm can't express.
    """
    heads = _heads(model)
    return {_timm_name(name): _interleave(name, t, heads) for name, t in model.state_dict().items()}


def from_timm(state_dict: Mapping[str, Tensor], model: Nest) -> dict[str, Tensor]:
    """State dict for `model` from that of a timm `nest_*_jx` model; load it with `model.load_state_dict`.

    Raises:
        ModelError: names are missing or unexpected, or the model is a multi-query one.
    """
    heads = _heads(model)
    names = {_timm_name(name): name for name in model.state_dict()}
    if names.keys() != state_dict.keys():
        differing = ", ".join(sorted(names.keys() ^ state_dict.keys())[:8])
        raise ModelError(f"not the weights of a timm nest of this size; names on one side only: {differing}")
    return {ours: _separate(ours, state_dict[theirs], heads) for theirs, ours in names.items()}


def _heads(model: Nest) -> tuple[int, ...]:
    if model.attention == "mqa":
        raise ModelError("timm's nest has no multi-query attention, so the weights of this model can't be converted")
    return model.num_heads


def _timm_name(name: str) -> str:
    for ours, theirs in _RENAMES:
        name = name.replace(ours, theirs)
    return name


def _interleave(name: str, weight: Tensor, heads: tuple[int, ...]) -> Tensor:
    if match := _PROJ.fullmatch(name):
        return weight.unflatten(1, (heads[int(match[1])], -1)).transpose(1, 2).flatten(1)
    return weight


def _separate(name: str, weight: Tensor, heads: tuple[int, ...]) -> Tensor:
    if match := _PROJ.fullmatch(name):
        return weight.unflatten(1, (-1, heads[int(match[1])])).transpose(1, 2).flatten(1)
    return weight
