"""What `train.compile` compiles: the model as one, or what an encoder layer computes, once for all that are alike."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from pipeline.models.layers import encoder_layers

# torch gives up on a function after so many versions. A layer has one for every sequence length, with and without
# stochastic depth, in training and in evaluation.
_VERSIONS = 64


def compile_model(
    model: nn.Module, how: bool | Literal["layers"], hooked: bool = False, backend: str = "inductor"
) -> None:
    """Have a model compiled when it is called first.

    Args:
        model: in place.
        how: `train.compile`: as one; its encoder layers, of which those alike share the code and its compilation; or
            not at all.
        hooked: the engine's hooks act around the layers and have to stay outside of what is compiled. Such a model
            can't be copied any more: a copy's layers would compute with the weights of the original.
        backend: torch.compile's.
    """
    if how != "layers":
        if how:
            model.compile(backend=backend)
        return
    layers = encoder_layers(model)
    assert layers, "every registered model has encoder layers"
    # Code for each length of a sequence, also where it gets shorter from layer to layer, rather than for any.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _VERSIONS)
    for layer in layers:
        if hooked:
            layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)
        else:
            layer.compile(backend=backend, dynamic=False)
