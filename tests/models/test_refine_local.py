"""Local kernels over the plane of queries: against a slow definition, in models, and what they don't go with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.models import ModelError, create_model, set_lean
from pipeline.models.bert_options import BertOptions
from pipeline.models.facts import count_macs, count_params
from pipeline.models.refine_local import PlaneLocal

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 4, "depth": 4, "num_classes": 5}
FORMS = ["plane", "volume", "plane_then_keys"]


def convolved(grid: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Cross-correlation of (C, s, s, N) with (C, a, b, c), zeros beyond the edges, one sum after the other."""
    out = np.zeros_like(grid)
    _, s, _, n = grid.shape
    reach = [length // 2 for length in kernel.shape[1:]]
    for place in np.ndindex(s, s, n):
        for offset in np.ndindex(kernel.shape[1:]):
            i, j, k = (p + o - r for p, o, r in zip(place, offset, reach, strict=True))
            if 0 <= i < s and 0 <= j < s and 0 <= k < n:
                out[:, *place] += kernel[:, *offset] * grid[:, i, j, k]
    return out


@torch.no_grad()
@pytest.mark.parametrize("class_token", [0, 1])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_kernels_are_the_definition(form: Any, kernel: int, class_token: int) -> None:
    torch.manual_seed(0)
    local = PlaneLocal(2, kernel, form).double()
    n = class_token + 9
    maps = torch.rand(2, 2, n, n, dtype=torch.float64)
    found = local(maps).numpy()
    for sample, out in zip(maps.numpy(), found, strict=True):
        wanted = convolved(sample[:, class_token:].reshape(2, 3, 3, n), local.plane.weight[:, 0].numpy())
        if form == "plane_then_keys":
            wanted = convolved(wanted, local.keys.weight[:, 0].numpy())
        np.testing.assert_allclose(out[:, class_token:], wanted.reshape(2, 9, n), rtol=0, atol=1e-13)
        np.testing.assert_array_equal(out[:, :class_token], sample[:, :class_token])


@pytest.mark.parametrize("flavour", ["official", "linear"])
@pytest.mark.parametrize(("form", "weights"), [("plane", 9), ("volume", 27), ("plane_then_keys", 12)])
def test_models_take_them(flavour: str, form: str, weights: int) -> None:
    base, model = (
        create_model("refiner_vit_s", **TINY, flavour=flavour, sharing=False, local=local) for local in ("raster", form)
    )
    each = 4 * 3 * (weights - 9)  # heads x expansion
    assert count_params(model) - count_params(base) == TINY["depth"] * each
    # Of the 17 rows of a map 16 are convolved; raster order convolves all.
    per_map = weights * 16 * 17 - 9 * 17 * 17
    assert count_macs(model) - count_macs(base) == TINY["depth"] * 4 * 3 * per_map
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if ".local." in n)


def test_other_architectures_take_them() -> None:
    images = torch.randn(2, 3, 32, 32)
    for name, options in (
        ("nest_micro", {"img_size": 32, "patch_size": 2, "depths": 1}),
        ("hvt_ti_2", {"img_size": 32, "patch_size": 4, "depth": 2, "pool_dims": 2, "head": "cls"}),
    ):
        model = create_model(name, **options, refine={"local": "plane"}).eval()
        plain = create_model(name, **options, refine={}).eval()
        assert model(images).shape == plain(images).shape and count_params(model) == count_params(plain)
    # One layer before the first pool, whose tokens do lie on a plane.
    create_model("hvt_s_1", refine={"local": "volume", "blocks": [0]})


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("refiner_vit_s", {"local": "grid"}, "refine.local='grid' is not one of"),
        (
            "nest_micro",
            {"refine": {"flavour": "official", "local": "plane", "kernels": "triton"}},
            "kernels=triton is for refine.local=raster",
        ),
        ("hvt_s_1", {"refine": {"local": "plane"}}, "the pool after layer 0 leaves 1x97: set refine.local=raster"),
        ("hvt_s_1", {"refine": {"local": "plane"}, "pool_dims": 2, "pool_stride": [1, 2]}, "leaves 14x7"),
    ],
)
def test_what_they_do_not_go_with(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model(model, **options)


def test_what_knows_raster_order_alone_says_so() -> None:
    model = create_model("refiner_vit_s", **TINY, local="plane")
    with pytest.raises(ModelError, match=r"fold\(\) is for refine.local=raster"):
        model.fold()
    with pytest.raises(ModelError, match=r"train.activation_checkpointing=maps is for refine.local=raster"):
        set_lean(model)
    with pytest.raises(ModelError, match="sentences lie on no plane"):
        BertOptions.of("bert_tiny", {"refine": {"local": "plane"}})
