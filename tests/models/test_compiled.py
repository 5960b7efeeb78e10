"""Layers compiled one by one: the same results, and no layer compiled that is like another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pipeline.models import create_model, num_drop_paths, set_drop_path_noise
from pipeline.models.compiled import compile_model

# Options, and how many different layers they make: per sequence length, and the first one, which drops nothing.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "nest_micro": ({"depths": 3, "embed_dims": [16, 32, 48], "num_heads": [1, 2, 3]}, 4),
    "hvt_s_2": ({"img_size": 32, "patch_size": 4, "depth": 6, "head_dim": 8}, 3),
    "refiner_vit_s": ({"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4}, 3),
    "deit_tiny": ({"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4}, 2),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def step(model: nn.Module, images: Tensor, noise: Tensor) -> list[Tensor]:
    """Logits and gradients."""
    set_drop_path_noise(model, noise)
    model.zero_grad()
    logits = model(images)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("hooked", "checkpointing"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("name", MODELS)
def test_layers_that_are_alike_are_compiled_once(name: str, hooked: bool, checkpointing: bool) -> None:
    options, kinds = MODELS[name]
    torch.manual_seed(0)
    plain = create_model(name, **options, num_classes=5, drop_path_rate=0.5).double().train()
    compiled = copy.deepcopy(plain)
    for model in (plain, compiled):
        model.set_grad_checkpointing(checkpointing)
    compile_model(compiled, "layers", hooked, backend="aot_eager")
    draw = torch.Generator().manual_seed(1)
    for number in range(3):
        images = torch.randn(3, 3, plain.img_size, plain.img_size, generator=draw, dtype=torch.float64)
        noise = torch.rand(3, num_drop_paths(plain), generator=draw)
        wanted, got = step(plain, images, noise), step(compiled, images, noise)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(b.abs().max()))
        if number == 0:
            assert counters["stats"]["unique_graphs"] == kinds
    assert counters["stats"]["unique_graphs"] == kinds  # other noise needs no other code
    assert not counters["graph_break"]


def test_a_copy_has_weights_of_its_own() -> None:
    options, _ = MODELS["nest_micro"]
    model = create_model("nest_micro", **options).eval()
    compile_model(model, "layers", backend="aot_eager")
    images = torch.randn(2, 3, model.img_size, model.img_size)
    with torch.no_grad():
        expected = model(images)
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(images), expected) and not model(images).any()


def test_nothing_is_compiled_unasked() -> None:
    options, _ = MODELS["nest_micro"]
    model = create_model("nest_micro", **options)
    compile_model(model, False)
    model(torch.randn(2, 3, model.img_size, model.img_size))
    assert not counters["stats"]
