"""Refiners that keep few maps: the same outputs, gradients and running statistics, and how much they keep."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models import ModelError, create_model, refine_group, set_lean
from pipeline.models.batch_norm import group_statistics
from pipeline.models.layers import MapLayer
from pipeline.models.refine_maps import LinearRefiner, OfficialRefiner
from tests.models.refiner_step import assert_same, kept_bytes, some_maps, step, with_weights

Make = Callable[[], nn.Module]
FORMS: dict[str, Make] = {
    "official": lambda: OfficialRefiner(3, 3, 3, 0.176),
    "official, wide": lambda: OfficialRefiner(4, 2, 5, 1.0),
    "official, kernel 1": lambda: OfficialRefiner(2, 1, 1, 0.5),
    "official, one head": lambda: OfficialRefiner(1, 6, 3, 0.5),
    "linear": lambda: LinearRefiner(3, 3, 3, True),
    "linear, wide": lambda: LinearRefiner(2, 6, 5, True),
    "linear, not reduced": lambda: LinearRefiner(3, 2, 3, False),
}


def pair(make: Make, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The plain refiner and the lean one."""
    plain = with_weights(make())
    lean = copy.deepcopy(plain)
    assert set_lean(lean) == 1
    return plain.to(dtype).train(), lean.to(dtype).train()


def some_padding(batch: int, tokens: int) -> Tensor:
    lengths = torch.arange(batch) % (tokens - 2) + 3
    tokens_there = (torch.arange(tokens) < lengths[:, None]).double()
    return tokens_there[:, None, :, None] * tokens_there[:, None, None, :]


SHAPES: dict[str, dict[str, Any]] = {
    "square": {"rows": 7, "columns": 7},
    "odd": {"rows": 5, "columns": 11},
    "not contiguous": {"rows": 6, "columns": 4, "contiguous": False},
}


@pytest.mark.parametrize("slices", [1, 3, 100])
@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_plain_path(form, shape, group, slices, monkeypatch):
    plain, lean = pair(FORMS[form])
    maps = some_maps(4, plain.expand.in_channels, **SHAPES[shape])
    assert maps.is_contiguous() == (shape != "not contiguous")
    whole = plain.expand.out_channels * maps[:, 0].numel()
    monkeypatch.setattr(refine_group, "SLICE", -(-whole // slices))
    assert_same(step(lean, maps, None, group), step(plain, maps, None, group), 1e-9)


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_padding_stays_out(form, group, slices, monkeypatch):
    plain, lean = pair(FORMS[form])
    maps = some_maps(4, plain.expand.in_channels, 6, 6)
    monkeypatch.setattr(refine_group, "SLICE", plain.expand.out_channels * maps[:, 0].numel() // slices)
    real = some_padding(4, 6)
    got, wanted = step(lean, maps, real, group), step(plain, maps, real, group)
    # The plain BatchNorm computes in float32 where there is padding.
    assert_same(got, wanted, 1e-4 if form.startswith("official") else 1e-9)
    assert not got["out"][(real == 0).expand_as(got["out"])].any()


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_as_if_the_maps_ended(form):
    plain, lean = pair(FORMS[form])
    maps, real = some_maps(3, plain.expand.in_channels, 6, 6), torch.zeros(3, 1, 6, 6, dtype=torch.float64)
    real[:, :, :4, :4] = 1
    padded, leaf = maps.clone().requires_grad_(), maps[:, :, :4, :4].clone().requires_grad_()
    got, wanted = lean(padded, real)[:, :, :4, :4], plain(leaf)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    (got.sin().sum() + wanted.sin().sum()).backward()
    torch.testing.assert_close(padded.grad[:, :, :4, :4], leaf.grad, rtol=0, atol=1e-8 * float(leaf.grad.abs().max()))
    assert padded.grad[:, :, 4:].abs().max() == padded.grad[:, :, :, 4:].abs().max() == 0


@pytest.mark.parametrize("form", ["official", "linear"])
def test_equals_finite_differences(form):
    _, lean = pair(FORMS[form])
    names, parameters = zip(*lean.named_parameters(), strict=True)

    def refine(maps: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(lean, dict(zip(names, values, strict=True)), (maps,))

    inputs = (some_maps(2, 3, 4, 4), *parameters)
    assert torch.autograd.gradcheck(refine, [t.detach().requires_grad_() for t in inputs], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["official", "linear"])
def test_half_precision_is_no_worse_than_the_plain_path(form, dtype):
    """Errors of both against float64, on maps as flat as fresh ones are."""
    plain, lean = pair(FORMS[form])
    flat = (0.05 * torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(9)).double()).softmax(-1)
    exact = step(plain, flat, None, None)
    errors = {}
    for name, refiner in (("plain", plain), ("lean", lean)):
        refiner = copy.deepcopy(refiner).float()
        refiner.zero_grad()
        with torch.autocast("cpu", dtype):
            found = step(refiner, flat.float(), None, None)
        assert all(found[n].dtype == torch.float32 for n in exact if n != "out" and "tracked" not in n)
        errors[name] = {n: float((found[n].double() - exact[n]).norm() / exact[n].norm()) for n in ("out", "maps")}
    for name, error in errors["lean"].items():
        assert error < 1.3 * errors["plain"][name] + 1e-3, errors


# Maps of one per head that an encoder layer keeps, its own softmax included.
KEPT = {
    "refiner_vit_s": (22, 3),
    "refiner_vit_s_linear": (8, 2),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("grouped", [False, True])
def test_maps_kept_for_the_backward_pass(name, grouped, capsys):
    size = {"img_size": 256, "embed_dim": 12, "num_heads": 12, "depth": 2, "num_classes": 3}
    model = create_model(name, **size).train()
    layer = model.blocks[1]
    assert isinstance(layer, MapLayer)
    if grouped:
        group_statistics(model, 2)
    tokens = torch.randn(2, 257, 12)
    before = torch.rand(2, 12, 257, 257).softmax(-1).requires_grad_()
    one_map = before.untyped_storage().nbytes()
    kept = []
    for lean in (False, True):
        set_lean(model, lean)
        kept.append(kept_bytes(lambda: layer(tokens, before), one_map // (12 if grouped else 4)) / one_map)
    assert kept == [pytest.approx(number, abs=0.1) for number in KEPT[name]]


@pytest.mark.parametrize("form", ["official", "linear"])
def test_compiles_to_one_graph(form):
    torch._dynamo.reset()
    _, lean = pair(FORMS[form])
    group_statistics(lean, 2)
    compiled = copy.deepcopy(lean)
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    maps = some_maps(4, 3, 6, 6)
    assert_same(step(compiled, maps, None, 2), step(lean, maps, None, 2), 1e-9)


def test_only_training_is_lean():
    plain, lean = pair(FORMS["official"])
    maps = some_maps(4, 3, 5, 5)
    with torch.no_grad():
        assert torch.equal(plain(maps), lean(maps))
    assert torch.equal(plain.eval()(maps), lean.eval()(maps))


def test_a_batch_that_cannot_be_cut_is_refused():
    _, lean = pair(FORMS["official"])
    group_statistics(lean, 3)
    with pytest.raises(ModelError, match="4 samples can't be cut into groups of 3"):
        lean(some_maps(4, 3, 5, 5))
