"""HVT, Refiner and DeiT compute what the official code computes, and load its weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.models import create_model, load_official
from pipeline.models.official import official_shapes

# model, options, tensors, L2 norm of the pooled features, first logits, argmax, maximum
HVT = [
    ("hvt_ti_1", 152, 13.8344186069, (-0.0451785060, -0.0065423673, 0.0883826059), 818, 0.0895979455),
    ("hvt_s_0", 151, 19.5805895700, (0.0496773364, -0.0465469515, 0.0113611683), 532, 0.0791039185),
    ("hvt_s_2", 153, 19.6202236167, (0.0475428846, -0.1898534989, 0.3057485855), 663, 0.3097060447),
]
REFINER = [
    (0.5, (0.0496159588, -0.0870928540, 0.0362358497, 0.0122769631, -0.0453891657), 0.1496716551, 839, 0.0996281662),
    (0.0, (0.0222691601, -0.0813008976, 0.0423599643, -0.0258399993, -0.0240610216), 0.0801205519, 263, 0.0844542193),
]
PRINTED = 0.6e-10  # half of the last printed digit, and some rounding


def wave(shape: tuple[int, ...], k: int) -> np.ndarray:
    return 0.02 * np.sin(0.37 * np.arange(np.prod(shape), dtype=np.float64) + k).reshape(shape)


def hvt_fill(name: str, shape: tuple[int, ...], k: int) -> np.ndarray:
    return wave(shape, k) + (name.endswith(("norm1.weight", "norm2.weight")) or name == "norm.weight")


def refiner_fill(name: str, shape: tuple[int, ...], k: int) -> np.ndarray:
    value = wave(shape, k)
    if "running_var" in name:
        return np.ones(shape) if name.startswith("patch_embed.bn") else 0.0004 * (1 + 25 * value)
    if name.endswith("running_mean"):
        return 0.1 * value
    if any(conv in name for conv in ("DLA.conv_exp", "DLA.depth_sep_conv", "DLA.conv_pro")):
        return 10 * value
    if name.endswith("mlp.scale_channel"):
        return value + 0.5
    owner = name.split(".")[-2] if "." in name else ""
    return value + (name.endswith("weight") and owner.startswith(("norm", "bn", "adapt_bn")))


def filled(model, fill) -> dict[str, np.ndarray]:
    shapes = official_shapes(model)
    names = sorted(name for name in shapes if not name.endswith("num_batches_tracked"))
    return {name: fill(name, shapes[name], k) for k, name in enumerate(names)}


def golden(name: str, fill, **options) -> torch.nn.Module:
    with torch.device("meta"):
        model = create_model(name, **options)
    model.to_empty(device="cpu").double().eval()
    load_official(model, filled(model, fill))
    return model


def image() -> torch.Tensor:
    return torch.sin(0.01 * torch.arange(3 * 224 * 224, dtype=torch.float64)).reshape(1, 3, 224, 224)


@torch.no_grad()
@pytest.mark.parametrize(("name", "tensors", "norm", "first", "argmax", "maximum"), HVT)
def test_hvt_golden_logits(name, tensors, norm, first, argmax, maximum):
    model = golden(name, hvt_fill)
    assert len(filled(model, hvt_fill)) == tensors
    tokens = model.forward_features(image())
    assert model.forward_head(tokens, pre_logits=True).norm().item() == pytest.approx(norm, abs=PRINTED)
    logits = model.forward_head(tokens)[0]
    np.testing.assert_allclose(logits[:3], first, rtol=0, atol=PRINTED)
    assert int(logits.argmax()) == argmax and logits.max().item() == pytest.approx(maximum, abs=PRINTED)


@torch.no_grad()
@pytest.mark.parametrize(("aux_weight", "first", "total", "argmax", "maximum"), REFINER)
def test_refiner_golden_logits(aux_weight, first, total, argmax, maximum):
    model = golden("refiner_vit_s", refiner_fill, aux_weight=aux_weight)
    assert len(filled(model, refiner_fill)) == 385
    logits = model(image())[0]
    np.testing.assert_allclose(logits[:5], first, rtol=0, atol=PRINTED)
    assert logits.sum().item() == pytest.approx(total, abs=PRINTED)
    assert int(logits.argmax()) == argmax and logits.max().item() == pytest.approx(maximum, abs=PRINTED)
