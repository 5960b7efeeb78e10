"""Attention maps, roll-out and token similarity."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.explain.maps import encoder_layers, kept_maps
from pipeline.explain.rollout import pool_matrix, relevance, roll_out
from pipeline.explain.similarity import mean_cosine, token_similarity
from pipeline.models import ImageModel
from tests.export.sources import source

MODELS = {
    "hvt_ti_1": {},
    "hvt_ti_4": {"img_size": 32},
    "hvt_ti_2": {"pool_dims": 2, "pool_kind": "avg", "head": "cls"},
    "refiner_vit_s": {},
    "refiner_vit_s_linear": {"reduction": False, "expansion": 2, "embed_dim": 48},
    "deit_tiny": {},
}


def model_and_images(name: str) -> tuple[ImageModel, Tensor]:
    model = source(name, **MODELS.get(name, {})).model
    generator = torch.Generator().manual_seed(0)
    return model, torch.randn(2, 3, model.img_size, model.img_size, generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_rollout_sum_to_1(name: str) -> None:
    model, images = model_and_images(name)
    rolled = roll_out(model, images)
    assert (rolled.after is not None) == name.startswith("refiner")
    for flow in (rolled.before, rolled.after):
        if flow is None:
            continue
        assert flow.min() >= 0
        torch.testing.assert_close(flow.sum(-1), torch.ones(flow.shape[:2]), rtol=0, atol=1e-5)
        side = model.img_size // model.patch_size  # type: ignore[operator]
        assert relevance(model, flow).shape == (2, side, side)
        assert flow.shape[2] in (side * side, side * side + 1)
    if rolled.after is not None:
        assert not torch.allclose(rolled.before, rolled.after)


def test_rollout_of_a_plain_model_is_the_product() -> None:
    model, images = model_and_images("deit_tiny")
    with torch.no_grad(), kept_maps(model) as maps:
        model(images)
    expected = torch.eye(17).expand(2, 17, 17)
    for layer in maps:
        expected = (layer.before.mean(1) + torch.eye(17)) / 2 @ expected
    torch.testing.assert_close(roll_out(model, images).before, expected)


@pytest.mark.parametrize("name", ["hvt_ti_1", "deit_tiny", "nest_tiny", "nest_tiny_cifar"])
def test_maps_are_those_of_a_plain_softmax(name: str) -> None:
    """Maps times values, projected, is what the fused attention gives."""
    model, images = model_and_images(name)
    inputs: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.attn.register_forward_hook(lambda _m, x, y: inputs.append((x[0], y)))  # type: ignore[union-attr, operator]
        for layer in encoder_layers(model)
    ]
    with torch.no_grad(), kept_maps(model) as maps:
        model(images)
    for hook in hooks:
        hook.remove()
    assert len(maps) == len(encoder_layers(model)) > 0
    for layer, kept, (x, out) in zip(encoder_layers(model), maps, inputs, strict=True):
        attention = layer.attn
        assert kept.after is None
        torch.testing.assert_close(kept.before.sum(-1), torch.ones(kept.before.shape[:-1]))
        heads, dim = attention.num_heads, x.shape[-1]  # type: ignore[union-attr]
        flat = x.flatten(0, -3)
        value_dim = (attention.qkv.out_features - dim) // 2  # type: ignore[union-attr, operator]
        value = attention.qkv(flat)[..., dim + value_dim :]  # type: ignore[union-attr, operator]
        value = value.unflatten(-1, (-1, dim // heads)).transpose(1, 2)  # type: ignore[operator]
        mixed = (kept.before @ value).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(attention.proj(mixed), out, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("name", ["hvt_ti_1", "refiner_vit_s", "deit_tiny", "nest_tiny"])
def test_nothing_stays_of_looking(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = model_and_images(name)
    fused = F.scaled_dot_product_attention
    calls: list[int] = []

    def counted(*args: Tensor, **options: object) -> Tensor:
        calls.append(1)
        return fused(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        before, used = model(images), len(calls)
        with kept_maps(model):
            during = model(images)
        with pytest.raises(RuntimeError), kept_maps(model):
            raise RuntimeError
        after = model(images)
    assert torch.equal(before, during) and torch.equal(before, after)
    assert len(calls) == 3 * used
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_refined_maps_are_what_the_refiner_makes() -> None:
    model, images = model_and_images("refiner_vit_s")
    with torch.no_grad(), kept_maps(model) as maps:
        model(images)
        assert [layer.after is not None for layer in maps] == [False, True]
        assert torch.equal(maps[0].before, maps[1].before)  # shared by the two layers
        refiner = encoder_layers(model)[1].attn.refiner  # type: ignore[union-attr]
        assert maps[1].after is not None
        torch.testing.assert_close(refiner(maps[1].before), maps[1].after)  # type: ignore[operator]


@pytest.mark.parametrize(
    "options",
    [
        {"pool_kind": "max"},
        {"pool_kind": "avg"},
        {"pool_kind": "max", "pool_dims": 2},
        {"pool_kind": "avg", "pool_dims": 2, "head": "cls"},
    ],
)
def test_pool_matrix_repeats_the_pool(options: dict[str, object]) -> None:
    """Of an average it is the average; of a maximum, for one channel, it picks the maximum."""
    pooling = source("hvt_ti_1", **options).model.pools["0"]  # type: ignore[union-attr, index]
    pooling.pos_embed = None
    length = 64 + int(pooling.class_token)
    x = torch.randn(2, length, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool_matrix(pooling, x) @ x, pooling(x))


def test_similarity_against_all_pairs() -> None:
    tokens = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    for image, found in zip(tokens, mean_cosine(tokens), strict=True):
        pairs = [F.cosine_similarity(image[i], image[j], dim=0) for i in range(9) for j in range(9) if i != j]
        torch.testing.assert_close(found, torch.stack(pairs).mean(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mean_cosine(torch.ones(1, 4, 3)), torch.ones(1))


@pytest.mark.parametrize("name", ["nest_tiny", "hvt_ti_1", "refiner_vit_s", "deit_tiny"])
def test_similarity_after_every_layer(name: str) -> None:
    model, images = model_and_images(name)
    logits, similarities = token_similarity(model, images)
    torch.testing.assert_close(logits, model(images))
    assert similarities.shape == (2, len(encoder_layers(model)))
    assert similarities.abs().max() <= 1
    assert not any(module._forward_hooks for module in model.modules())
