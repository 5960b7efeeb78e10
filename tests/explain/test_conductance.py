"""Shares of the logit: they add up, and are the integral they are said to be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.explain.conductance import conduct_tree
from tests.explain.test_gradcat import VARIANTS, images, nest


@pytest.mark.parametrize("name", VARIANTS)
def test_shares_add_up(name: str) -> None:
    """Children to their parent, and the root to what the logit gains over the plain picture."""
    model = nest(name)
    batch, classes, plain = images(model), torch.tensor([0, 3, 6]), torch.tensor([0.5, -0.2, 0.1])
    tree = conduct_tree(model, batch, classes, plain=plain, steps=100)
    assert [scores.shape[1:] for scores in tree.scores] == [(2**d, 2**d) for d in range(1, len(model.levels))]
    for parents, children in zip(tree.scores, tree.scores[1:], strict=False):
        torch.testing.assert_close(F.avg_pool2d(children[:, None], 2)[:, 0] * 4, parents, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        start = model(plain.double()[:, None, None].expand_as(batch))
        gained = (model(batch) - start).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(tree.scores[0].sum((1, 2)), gained, rtol=0.03, atol=1e-3)
    opposite = conduct_tree(model, batch, classes, sign=-1, plain=plain, steps=100)
    assert all(torch.equal(a, -b) for a, b in zip(tree.scores, opposite.scores, strict=True))


def test_a_share_is_the_integral_over_its_block() -> None:
    """Against the derivative of the logit when this one block of the map moves along, and all others stand still."""
    model = nest("nest_tiny_cifar")
    image, target, steps = images(model, 1), 3, 200
    tree = conduct_tree(model, image, torch.tensor([target]), steps=steps)

    def lower(t: float) -> torch.Tensor:
        return model.levels[0](model.patch_embed(t * image).permute(0, 2, 3, 1))

    def logit(plane: torch.Tensor) -> torch.Tensor:
        for level in list(model.levels)[1:]:
            plane = level(plane)
        return model.forward_head(model.norm(plane.flatten(1, 2)))[0, target]

    side = 2 ** (len(model.levels) - 1)
    for row, column in ((0, 0), (2, 1)):
        with torch.no_grad():
            size = lower(1.0).shape[1] // side
            inside = torch.zeros(1, size * side, size * side, 1, dtype=torch.float64)
            inside[:, row * size : (row + 1) * size, column * size : (column + 1) * size] = 1
            total = 0.0
            for step in range(steps):
                here, ahead, back = (lower(((step + d) / steps) ** 2) for d in (0.5, 1, 0))
                move = inside * (ahead - back)
                total += float(logit(here + move / 2) - logit(here - move / 2))
        assert float(tree.scores[-1][0, row, column]) == pytest.approx(total, rel=0.02, abs=1e-6)


def test_nothing_is_left_on_the_model() -> None:
    model = nest("nest_tiny")
    batch = images(model)
    conduct_tree(model, batch, steps=2)
    assert all(param.grad is None for param in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(conduct_tree(model, batch, steps=2).classes, model(batch).argmax(1))
