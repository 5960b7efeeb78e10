"""Shares of the logit: they add up, and are the integral they are said to be."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from pipeline.explain.conductance import conduct_tree
from tests.explain.test_gradcat import VARIANTS, images, nest


def without(images: torch.Tensor, plain: torch.Tensor, leaves: int, row: int, column: int) -> torch.Tensor:
    """The images with every other leaf of every other row in the plain colour, from this one on."""
    done, side = images.clone(), images.shape[-1] // leaves
    for y in range(row, leaves, 2):
        for x in range(column, leaves, 2):
            done[:, :, y * side : (y + 1) * side, x * side : (x + 1) * side] = plain[:, None, None]
    return done


@pytest.mark.parametrize("name", VARIANTS)
def test_shares_add_up(name: str) -> None:
    """Children to their parent, and each quarter of the leaves to what the logit loses without them."""
    model = nest(name)
    batch, classes, plain = images(model), torch.tensor([0, 3, 6]), torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    tree = conduct_tree(model, batch, classes, plain=plain, steps=60)
    assert [scores.shape[1:] for scores in tree.scores] == [(2**d, 2**d) for d in range(1, len(model.levels))]
    for parents, children in zip(tree.scores, tree.scores[1:], strict=False):
        torch.testing.assert_close(F.avg_pool2d(children[:, None], 2)[:, 0] * 4, parents, rtol=1e-9, atol=1e-12)
    shares, lost = [], []
    for row, column in product((0, 1), repeat=2):
        with torch.no_grad():
            rest = model(without(batch, plain, 2 ** (len(model.levels) - 1), row, column))
        lost.append((tree.logits - rest).gather(1, classes[:, None])[:, 0])
        shares.append(tree.scores[-1][:, row::2, column::2].sum((1, 2)))
    error = torch.stack(shares) - torch.stack(lost)
    print(f"{name}: {error.norm() / torch.stack(lost).norm():.4f}")
    assert error.norm() < 0.03 * torch.stack(lost).norm()
    opposite = conduct_tree(model, batch, classes, sign=-1, plain=plain, steps=60)
    assert all(torch.equal(a, -b) for a, b in zip(tree.scores, opposite.scores, strict=True))


def test_a_share_is_the_integral_over_its_block() -> None:
    """Against the derivative of the logit when this one block of the map moves along, and all others stand still."""
    model = nest("nest_tiny_cifar")
    image, target, steps, leaves = images(model, 1), 3, 200, 2 ** (len(model.levels) - 1)
    tree = conduct_tree(model, image, torch.tensor([target]), steps=steps)

    def logit(plane: torch.Tensor) -> torch.Tensor:
        for level in list(model.levels)[1:]:
            plane = level(plane)
        return model.forward_head(model.norm(plane.flatten(1, 2)))[0, target]

    for row, column in ((0, 0), (2, 1)):
        rest = without(image, torch.zeros(3), leaves, row % 2, column % 2)

        def lower(t: float, rest: torch.Tensor = rest) -> torch.Tensor:
            return model.levels[0](model.patch_embed(torch.lerp(image, rest, t)).permute(0, 2, 3, 1))

        with torch.no_grad():
            size = lower(1.0).shape[1] // leaves
            inside = torch.zeros(1, size * leaves, size * leaves, 1, dtype=torch.float64)
            inside[:, row * size : (row + 1) * size, column * size : (column + 1) * size] = 1
            total = 0.0
            for step in range(steps):
                here, ahead, back = (lower((step + d) / steps) for d in (0.5, 1, 0))
                move = inside * (ahead - back)
                total -= float(logit(here + move / 2) - logit(here - move / 2))
        assert float(tree.scores[-1][0, row, column]) == pytest.approx(total, rel=0.02, abs=1e-6)


def test_nothing_is_left_on_the_model() -> None:
    model = nest("nest_tiny")
    batch = images(model)
    conduct_tree(model, batch, steps=2)
    assert all(param.grad is None for param in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(conduct_tree(model, batch, steps=2).classes, model(batch).argmax(1))
