"""AdamW with the papers' weight-decay groups."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.config import OptimConfig


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


def make_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.AdamW:
    """AdamW over the groups of `decay_groups`, as one fused update per group.

    The fused form takes a `found_inf` flag on the device, by which the loop skips a bad step without asking the host.
    """
    parameters = dict(model.named_parameters())
    with_decay, without = decay_groups(model, config.decay)
    groups = [
        {"params": [parameters[n] for n in with_decay], "weight_decay": config.weight_decay},
        {"params": [parameters[n] for n in without], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=config.betas, eps=config.eps, fused=True)
