"""GradCAT against its definition, computed slowly in float64, and CAM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.explain.cam import class_activation
from pipeline.explain.gradcat import check_tree, descend, grow_tree
from pipeline.models import create_model
from pipeline.models.nest import Nest
from tests.export.sources import source

VARIANTS: dict[str, dict[str, Any]] = {
    "nest_tiny": {},
    "nest_tiny_cifar": {},
    "nest_micro": {"num_levels": 2, "embed_dims": 8, "num_heads": 1, "img_size": 6, "depths": 1},  # blocks of 3 tokens
    "nest_small": {"aggregation": "patch_merge"},
    "nest_base": {"aggregation_plane": "block", "pos_embed": "shared"},
}


def nest(name: str) -> Nest:
    return check_tree(source(name, **VARIANTS[name]).model.double())


def images(model: Nest, count: int = 3) -> Tensor:
    return torch.randn(count, 3, model.img_size, model.img_size, dtype=torch.float64, generator=_seeded())


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def slow_path(model: Nest, image: Tensor, target: int, sign: int) -> tuple[list[list[float]], list[tuple[int, int]]]:
    """Algorithm 1 for one image, cell by cell, its gradients by a network that begins at each level."""
    planes, x = [], model.patch_embed(image[None]).permute(0, 2, 3, 1)
    for level in model.levels:
        x = level(x)
        planes.append(x.detach())

    def logit(plane: Tensor, after: int) -> Tensor:
        for level in list(model.levels)[after + 1 :]:
            plane = level(plane)
        return model.forward_head(model.norm(plane.flatten(1, 2)))[0, target]

    scores, blocks, row, column = [], [], 0, 0
    for number in range(len(model.levels) - 1, 0, -1):
        plane = planes[number]
        if number == len(model.levels) - 1:
            plane = model.norm(plane)
            alpha = plane.requires_grad_()
            alpha_logit = model.forward_head(alpha.flatten(1, 2))[0, target]
        else:
            alpha = plane.requires_grad_()
            alpha_logit = logit(alpha, number)
        (gradient,) = torch.autograd.grad(alpha_logit, alpha)
        product = (sign * alpha * gradient)[0].detach()
        side, half = model.block_size, model.block_size / 2
        four = []
        for i in range(4):
            top, left = row * side + (i // 2) * half, column * side + (i % 2) * half
            total = 0.0
            for y in range(product.shape[0]):
                for x_ in range(product.shape[1]):
                    covered = max(0.0, min(y + 1, top + half) - max(y, top))
                    covered *= max(0.0, min(x_ + 1, left + half) - max(x_, left))
                    total += covered * float(product[y, x_].sum())
            four.append(total / (half * half * product.shape[2]))
        child = max(range(4), key=lambda i: four[i])
        row, column = 2 * row + child // 2, 2 * column + child % 2
        scores.append(four)
        blocks.append((row, column))
    return scores, blocks


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", VARIANTS)
def test_path_is_that_of_the_algorithm(name: str, sign: int) -> None:
    model = nest(name)
    batch, classes = images(model), torch.tensor([0, 3, 6])
    path = descend(grow_tree(model, batch, classes, sign))
    assert path.scores.shape == (3, len(model.levels) - 1, 4)
    for i in range(3):
        scores, blocks = slow_path(model, batch[i], int(classes[i]), sign)
        expected = torch.tensor(scores, dtype=torch.float64)
        torch.testing.assert_close(path.scores[i], expected, rtol=1e-9, atol=1e-15)
        assert [tuple(block) for block in path.blocks[i].tolist()] == blocks
        assert torch.equal(path.children[i], expected.argmax(1))


@pytest.mark.parametrize("name", VARIANTS)
def test_signs_and_batches(name: str) -> None:
    model = nest(name)
    batch = images(model)
    tree, other = grow_tree(model, batch), grow_tree(model, batch, sign=-1)
    assert torch.equal(tree.classes, model(batch).argmax(1))
    assert all(torch.equal(a, -b) for a, b in zip(tree.scores, other.scores, strict=True))
    alone = grow_tree(model, batch[1:2])
    for a, b in zip(tree.scores, alone.scores, strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-9, atol=1e-15)
    assert all(param.grad is None for param in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_channel_weights_are_mean_gradients() -> None:
    model = nest("nest_tiny_cifar")
    batch = images(model)
    tree = grow_tree(model, batch, channel_weights=True)
    torch.testing.assert_close(tree.scores[0], grow_tree(model, batch).scores[0])  # there all cells weigh the same
    x = model.patch_embed(batch).permute(0, 2, 3, 1)
    for level in model.levels[:2]:
        x = level(x)
    plane = x.detach().requires_grad_()
    x = plane
    for level in model.levels[2:]:
        x = level(x)
    logits = model.forward_head(model.norm(x.flatten(1, 2)))
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), plane)
    heat = (plane * gradient.mean((1, 2), keepdim=True)).mean(-1)[:, None]
    torch.testing.assert_close(tree.scores[-1], torch.nn.functional.avg_pool2d(heat, heat.shape[-1] // 8)[:, 0])


def test_root_scores_are_the_quadrants_of_cam() -> None:
    model = nest("nest_tiny_cifar")
    batch = images(model)
    tree = grow_tree(model, batch)
    logits, classes, maps = class_activation(model, batch)
    assert torch.equal(classes, tree.classes)
    bias = model.head.bias.detach()[classes]  # type: ignore[index, union-attr]
    torch.testing.assert_close(maps.mean((1, 2)) + bias, logits.amax(1))
    tokens, channels = model.block_size**2, model.norm.weight.numel()
    quadrants = torch.nn.functional.avg_pool2d(maps[:, None], model.block_size // 2)[:, 0]
    torch.testing.assert_close(tree.scores[0] * tokens * channels, quadrants)


def test_before_the_last_norm_there_is_nothing_to_score() -> None:
    model = nest("nest_tiny")
    batch = images(model)
    after, before = grow_tree(model, batch).scores[0], grow_tree(model, batch, before_norm=True).scores[0]
    assert before.abs().max() < 1e-4 * after.abs().max()


CASES = {
    "no NesT": (lambda: source("hvt_ti_1").model, "this model is a Hvt"),
    "one level": (lambda: create_model("nest_micro", num_levels=1, depths=1, embed_dims=8, num_heads=1), "has one"),
    "blocks of a token": (lambda: create_model("nest_micro", img_size=4), "single tokens"),
}


@pytest.mark.parametrize("case", CASES)
def test_models_without_a_tree(case: str) -> None:
    make, expected = CASES[case]
    with pytest.raises(UserError, match=expected):
        check_tree(make())
