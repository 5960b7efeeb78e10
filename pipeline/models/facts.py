"""Parameters and multiply-adds of a model, counted without computing anything."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.base import ImageModel
from pipeline.models.pool import TokenPool
from pipeline.models.registry import create_model


@dataclass(frozen=True)
class ModelFacts:
    """Size of one model: trainable parameters, and multiply-adds (MACs) of one image's forward pass."""

    params: int
    macs: int


def count_params(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: ImageModel) -> int:
    """Multiply-adds of the forward pass for one image of the model's size.

    Counts convolutions, matrix products and attention (queries times keys, weights times values), as the papers do; not
    norms, activations or pooling. The count runs on the meta device; the model itself stays where and as it is.
    """
    return module_macs(model, torch.empty(1, model.in_chans, model.img_size, model.img_size, device="meta"))


def module_macs(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of a module's forward pass in evaluation, for inputs on the meta device; as `count_macs`."""
    tensors = {name: t.to("meta") for name, t in chain(module.named_parameters(), module.named_buffers())}
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(module, tensors, inputs)
    finally:
        for part, training in modes.items():
            part.training = training
    return counter.get_total_flops() // 2


def count_macs_ptflops(model: ImageModel) -> int:
    """Multiply-adds as HVT's and DeiT's authors counted them, with ptflops up to 0.6.4.

    `count_macs` plus the biases of convolutions (every output element) and of linear layers (once per layer, whatever
    the number of tokens), plus the elements that go into pools.
    """
    extra = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal extra
        if isinstance(module, nn.Linear) and module.bias is not None:
            extra += module.out_features
        elif isinstance(module, nn.Conv1d | nn.Conv2d) and module.bias is not None:
            extra += output[0].numel()
        elif isinstance(module, TokenPool) and module.conv is None:
            extra += inputs[0][0].numel()

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    try:
        macs = count_macs(model)
    finally:
        for hook in hooks:
            hook.remove()
    return macs + extra


def model_facts(name: str, **overrides: Any) -> ModelFacts:
    """Facts of `create_model(name, **overrides)`, e.g. at another `img_size`, without allocating its weights."""
    with torch.device("meta"):
        model = create_model(name, **overrides)
    return ModelFacts(count_params(model), count_macs(model))
