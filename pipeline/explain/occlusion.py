"""GradCAT's tree with what a model does instead of what its gradient says: each block is masked, and the logit read.

The score of a block is what the logit loses. It is also what GradCAT's product, gradient times change, adds up to when
that one block fades out of the picture, and so the most faithful score there is of a block by itself. Children don't
add up to their parent: two blocks that show the same are missed only together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.explain.deletion import masked
from pipeline.explain.gradcat import Tree
from pipeline.models.nest import Nest


@torch.no_grad()
def occlude_tree(
    model: Nest,
    images: Tensor,
    classes: Tensor | None = None,
    sign: int = 1,
    plain: Tensor | None = None,
) -> Tree:
    """Score all nodes, with a forward pass of all images for each: 20 for the tree of 3 levels.

    Args:
        model: in evaluation mode; see `check_tree`.
        images: (B, C, S, S), as the model takes them.
        classes: (B,) int64; None: the predicted ones.
        sign: +1 or -1, which all scores are multiplied with.
        plain: (C,) colour of the mask, normalised as the images are; None: 0, the mean that normalisation takes away.
    """
    logits = model(images)
    classes = logits.argmax(1) if classes is None else classes
    fill = images.new_zeros(images.shape[1]) if plain is None else plain.to(images)
    before = logits.gather(1, classes[:, None])[:, 0]
    scores = []
    for depth in range(1, len(model.levels)):
        side = 2**depth
        lost = []
        for block in range(side * side):
            row, column = (torch.full((len(images),), place, device=images.device) for place in divmod(block, side))
            after = model(masked(images, row, column, side, fill)).gather(1, classes[:, None])[:, 0]
            lost.append(sign * (before - after))
        scores.append(torch.stack(lost, 1).unflatten(1, (side, side)))
    return Tree(logits, classes, scores)
