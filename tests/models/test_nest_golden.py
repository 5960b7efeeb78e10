"""NesT computes what timm and a second implementation of the official code compute, and loads their weights."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import timm
import torch

from pipeline.models import ModelError, create_model, load_official
from pipeline.models.official import official_shapes
from pipeline.models.timm_weights import from_timm, to_timm
from tests.models.flax_fill import filled, golden_image

GOLDEN = [
    # model, options, logits[0:5], sum of all logits
    ("nest_tiny_cifar", {}, (-0.538733143, -0.349792647, 0.814078633, 0.127289866, 0.680928700), 0.308764361),
    (
        "nest_tiny_cifar",
        {"gelu": "erf"},
        (-0.538628336, -0.349813930, 0.814057544, 0.127376720, 0.680969888),
        0.308435880,
    ),
    (
        "nest_tiny_cifar",
        {"gelu": "erf", "pool_pad": "symmetric"},
        (-0.573571313, -0.412545004, 0.758337407, 0.152312713, 0.703833301),
        0.142993879,
    ),
    ("nest_tiny", {}, (-0.488732809, 0.044729147, -1.723804153, 0.904880647, -1.161566557), 3.647078762),
    (
        "nest_tiny",
        {"gelu": "erf"},
        (-0.488980432, 0.044388465, -1.723861688, 0.905373543, -1.161207157),
        3.652122848,
    ),
    (
        "nest_tiny",
        {"gelu": "erf", "pool_pad": "symmetric"},
        (-0.467114254, 0.023883313, -1.704267170, 0.931014921, -1.182105686),
        3.806462690,
    ),
]


@cache
def golden_weights(name: str) -> dict[str, np.ndarray]:
    with torch.device("meta"):
        return filled(official_shapes(create_model(name)))


@pytest.mark.parametrize(("name", "options", "first", "total"), GOLDEN)
def test_golden_logits(name, options, first, total):
    with torch.device("meta"):
        model = create_model(name, **options)
    model.to_empty(device="cpu").double().eval()
    load_official(model, golden_weights(name))
    with torch.no_grad():
        logits = model(golden_image(model.img_size))[0]
    printed = 0.6e-9  # half of the last printed digit, and some rounding
    np.testing.assert_allclose(logits[:5], first, rtol=0, atol=printed)
    assert logits.sum().item() == pytest.approx(total, abs=printed)


def test_official_prefix_and_optimizer_state_are_understood():
    plain, prefixed = create_model("nest_micro"), create_model("nest_micro")
    weights = filled(official_shapes(plain))
    load_official(plain, weights)
    checkpoint = {f"optimizer/target/{name}": value for name, value in weights.items()}
    checkpoint["optimizer/state/step"] = np.zeros(())
    checkpoint["optimizer/state/param_states/Dense_0/bias/grad_ema"] = np.zeros(10)
    load_official(prefixed, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), prefixed.parameters(), strict=True))


@pytest.mark.parametrize("attention", ["mha", "mqa"])
def test_every_official_tensor_is_used_once_and_sets_every_weight(attention):
    model = create_model("nest_micro", attention=attention)
    shapes = official_shapes(model)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == sum(p.numel() for p in model.parameters())
    # Distinct integers everywhere: whatever lands twice, or not at all, changes the multiset of values.
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    numbered = {
        key: np.arange(end - np.prod(shape), end, dtype=np.float64).reshape(shape)
        for (key, shape), end in zip(shapes.items(), ends, strict=True)
    }
    load_official(model.double(), numbered)
    values = torch.cat([p.detach().flatten() for p in model.parameters()]).sort().values
    assert torch.equal(values, torch.arange(int(ends[-1]), dtype=torch.float64))


def test_official_weights_that_do_not_fit_are_named_and_change_nothing():
    model = create_model("nest_micro")
    before = [p.clone() for p in model.parameters()]
    weights = filled(official_shapes(model))
    weights["Dense_0/kernel"] = weights["Dense_0/kernel"].T
    weights["ConvPool_0/Conv_0/weight"] = weights.pop("ConvPool_0/Conv_0/kernel")
    with pytest.raises(ModelError) as error:
        load_official(model, weights)
    message = str(error.value)
    assert "missing: ConvPool_0/Conv_0/kernel" in message
    assert "unexpected: ConvPool_0/Conv_0/weight" in message
    assert "Dense_0/kernel is (10, 96), the model needs (96, 10)" in message
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ModelError, match="no official weight format is known for Linear"):
        load_official(torch.nn.Linear(1, 1), {})


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize(("img_size", "dtype", "tolerance"), [(224, torch.float32, 1e-5), (64, torch.float64, 1e-12)])
def test_logits_equal_timm_after_conversion_both_ways(img_size, dtype, tolerance):
    torch.manual_seed(0)
    with torch.device("meta"):
        theirs = timm.create_model("nest_tiny_jx", img_size=img_size, num_classes=17)
        ours = create_model("nest_tiny", img_size=img_size, num_classes=17, gelu="erf")
    theirs.to_empty(device="cpu").to(dtype).eval()
    ours.to_empty(device="cpu").to(dtype).eval()
    for name, param in theirs.named_parameters():
        scale = param.ndim == 1 and name.endswith("weight")
        param.normal_(mean=1.0 if scale else 0.0, std=0.05)
    images = torch.randn(1, 3, img_size, img_size, dtype=dtype)

    ours.load_state_dict(from_timm(theirs.state_dict(), ours))
    assert relative_error(ours(images), theirs(images)) <= tolerance

    back = to_timm(ours)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


def test_timm_conversion_refuses_what_timm_cannot_express():
    with pytest.raises(ModelError, match="multi-query"):
        to_timm(create_model("nest_tiny_cifar", embed_dims=24))
    micro = create_model("nest_micro")
    with pytest.raises(ModelError, match=r"names on one side only: extra, patch_embed\.proj\.bias"):
        from_timm(
            {"extra": torch.zeros(1), **{k: v for k, v in to_timm(micro).items() if k != "patch_embed.proj.bias"}},
            micro,
        )
