"""Fresh HVT, Refiner and DeiT models are drawn as their official code draws them; `test_nest.py` has NesT."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn

from pipeline.models import create_model

# Wide enough for samples that tell 0.02 from 0.0176, what NesT's cut at two deviations leaves of it.
SMALL = {
    "hvt_s_2": {"img_size": 64, "depth": 2},
    "refiner_vit_s": {"img_size": 64, "depth": 2},
    "deit_small": {"img_size": 64, "depth": 2},
}
NORMAL = stats.norm(scale=0.02)  # timm 0.3.2 and 0.4.8 cut at the absolute -2 and 2, which is nowhere


def expected(model: nn.Module) -> dict[str, Any]:
    """For every parameter its distribution, or the number that all its values are."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        own = {name: f"{path}.{name}".removeprefix(".") for name, _ in module.named_parameters(recurse=False)}
        for name, full in own.items():
            if isinstance(module, nn.Linear):
                found[full] = NORMAL if name == "weight" else 0.0
            elif isinstance(module, nn.Conv2d):  # torch's default, which the official code leaves as it is
                bound = 1 / sqrt(module.weight[0].numel())
                found[full] = stats.uniform(-bound, 2 * bound)
            elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                found[full] = 1.0 if name == "weight" else 0.0
            else:
                found[full] = {"pos_embed": NORMAL, "cls_token": NORMAL, "scale": 1e-5}[name]
    return found


@pytest.mark.parametrize("name", SMALL)
def test_initial_weights_follow_the_official_distribution(name: str) -> None:
    torch.manual_seed(3)
    model = create_model(name, **SMALL[name])
    wanted = expected(model)
    assert wanted.keys() == dict(model.named_parameters()).keys()
    assert ("scale" in {key.rpartition(".")[2] for key in wanted}) == (name == "refiner_vit_s")
    for key, param in model.named_parameters():
        if isinstance(wanted[key], float):
            assert torch.equal(param, torch.full_like(param, wanted[key])), key
        else:
            values = param.detach().flatten()[:50_000].numpy()
            assert stats.kstest(values, wanted[key].cdf).pvalue > 1e-3, key
            if wanted[key] is NORMAL and len(values) > 20_000:
                assert values.max() > 0.07 and values.min() < -0.07, f"{key} is cut"
