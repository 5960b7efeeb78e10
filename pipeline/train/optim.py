"""AdamW with the papers' weight-decay groups and, for fine-tuning, a learning rate that decays from layer to layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from pipeline.config import OptimConfig
from pipeline.models.layer_numbers import layer_numbers


class Group(NamedTuple):
    """Parameters with the same settings.

    Attributes:
        names: of the parameters; at least one.
        weight_decay: decoupled, times their learning rate.
        lr_scale: their learning rate over that of the schedule.
    """

    names: list[str]
    weight_decay: float
    lr_scale: float


def decay_groups(model: nn.Module, decay: str) -> tuple[list[str], list[str]]:
    """Names of the parameters with and without weight decay.

    Args:
        model: names the parameters that its paper exempts in `no_weight_decay()`, if it has any.
        decay: `all` decays everything else (NesT's official code: biases and LayerNorm scales too); `matrices` excludes
            parameters of one dimension as well (timm, hence DeiT, HVT and Refiner).
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    with_decay: list[str] = []
    without: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = name in exempt or (decay == "matrices" and (parameter.ndim <= 1 or name.endswith(".bias")))
            (without if free else with_decay).append(name)
    return with_decay, without


def lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Learning rate of every parameter over that of the schedule, by name: layer_decay^(L + 1 - i) in layer i.

    BEiT's `optim_factory.py`, timm's `param_groups_layer_decay`; for i and L see `layer_numbers`. The heads have 1.
    """
    if layer_decay == 1:
        return {name: 1.0 for name, _ in model.named_parameters()}
    numbers = layer_numbers(model)
    last = max(numbers.values())
    return {name: layer_decay ** (last - number) for name, number in numbers.items()}


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """The groups of the optimizer: those of `decay_groups`, each cut by layers, from the heads down."""
    scales = lr_scales(model, config.layer_decay)
    groups = []
    for names, weight_decay in zip(decay_groups(model, config.decay), (config.weight_decay, 0.0), strict=True):
        for scale in sorted({scales[name] for name in names}, reverse=True):
            groups.append(Group([name for name in names if scales[name] == scale], weight_decay, scale))
    return groups


def make_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, as one fused update per group.

    The fused form takes a `found_inf` flag on the device, by which the loop skips a bad step without asking the host.
    """
    parameters = dict(model.named_parameters())
    groups = [
        {
            "params": [parameters[name] for name in group.names],
            "weight_decay": group.weight_decay,
            "lr": lr * group.lr_scale,
            "lr_scale": group.lr_scale,
        }
        for group in parameter_groups(model, config)
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rates of a step.

    Args:
        optimizer: of `make_optimizer`, or what an engine has put around it.
        lr: that of the schedule.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
