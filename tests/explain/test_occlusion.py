"""What the logit loses without a block."""

from __future__ import annotations

import pytest
import torch

from pipeline.explain.occlusion import occlude_tree
from tests.explain.test_gradcat import VARIANTS, images, nest


@pytest.mark.parametrize("name", VARIANTS)
def test_a_score_is_the_loss_of_the_logit(name: str) -> None:
    """Against pictures in which one block is painted over by hand, for two blocks of every depth."""
    model = nest(name)
    batch, classes, plain = images(model), torch.tensor([0, 3, 6]), torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    tree = occlude_tree(model, batch, classes, plain=plain)
    with torch.no_grad():
        logits = model(batch)
        assert torch.equal(tree.logits, logits) and torch.equal(tree.classes, classes)
        for depth, scores in enumerate(tree.scores, 1):
            blocks = 2**depth
            side = model.img_size // blocks
            assert scores.shape == (3, blocks, blocks)
            for row, column in ((0, blocks - 1), (blocks - 1, 0)):
                painted = batch.clone()
                place = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
                painted[:, :, place[0], place[1]] = plain[:, None, None]
                lost = (logits - model(painted)).gather(1, classes[:, None])[:, 0]
                torch.testing.assert_close(scores[:, row, column], lost)
    opposite = occlude_tree(model, batch, classes, -1, plain)
    assert all(torch.equal(a, -b) for a, b in zip(tree.scores, opposite.scores, strict=True))


def test_the_predicted_classes_and_the_mean_colour_are_what_is_taken() -> None:
    model = nest("nest_tiny")
    batch = images(model)
    tree = occlude_tree(model, batch)
    with torch.no_grad():
        assert torch.equal(tree.classes, model(batch).argmax(1))
    same = occlude_tree(model, batch, tree.classes, plain=torch.zeros(3))
    assert all(torch.equal(a, b) for a, b in zip(tree.scores, same.scores, strict=True))
    assert all(param.grad is None for param in model.parameters())
