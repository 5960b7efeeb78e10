"""GradCAT, gradient-based class-aware tree traversal: which block of a NesT, level by level, speaks for a class.

Zhang et al., "Nested Hierarchical Transformer", AAAI 2022, arXiv 2105.12723, section "GradCAT", Algorithm 1; its
authors released no code. With A_l the feature map of level l (the image plane after the level's encoder layers, before
the aggregation; of the last level after the final LayerNorm) and Y_c the logit of class c:

    α = A_L
    for l = L ... 2:
        h = sign · α ∘ ∂Y_c/∂α            element by element
        s = mean of h over the channels and the cells of each quadrant of α: 4 scores
        k = argmax s                      the next node of the path
        α = the part of A_{l-1} that became quadrant k: one block of level l-1, seen as an image plane

`sign` is +1 here: the larger the score, the more a node raises the logit. The paper is understood to print -∂Y_c/∂α,
which fits a loss rather than a logit; -1 gives that. docs/explain.md says what was measured for both.

Whether the last map is taken before or after the final LayerNorm is not known, and before it there is nothing to take:
LN(x) doesn't change when x grows, so Σ_channels x · ∂Y_c/∂x is 0 in every cell of every image, but for the epsilon of
the LayerNorm (`before_norm=True` shows it). After it the scores of the root are the quadrants of CAM.

The same ails the lower levels, if less: inside of a region what enters a convolution and a LayerNorm cancels, but for
its border and the bias. `channel_weights=True` departs from the algorithm there, to Grad-CAM's weights (Selvaraju et
al., arXiv 1610.02391): ∂Y_c/∂α is replaced by its mean over all cells of the level, one weight for each channel. At the
root nothing changes. What does lead to the right block is in `conductance`, the default of `rookery explain`, and in
`occlusion`: the same tree and the same walk with other scores.

Every α is a part of some A_l, and ∂Y_c/∂α that part of ∂Y_c/∂A_l. So one backward pass gives the scores of all nodes of
the tree, and the path is a walk down in them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models import ImageModel
from pipeline.models.nest import Nest


class Tree(NamedTuple):
    """The scores of every node of the trees of B images.

    Attributes:
        logits: (B, K).
        classes: (B,) int64, the class whose logit is explained.
        scores: for each depth d = 1 ... L-1 below the root (B, 2^d, 2^d): the blocks of level L-d where they lie.
    """

    logits: Tensor
    classes: Tensor
    scores: list[Tensor]


class Path(NamedTuple):
    """The way from the root to a leaf, for B images and the D = L-1 steps of a NesT of L levels.

    Attributes:
        scores: (B, D, 4) of the children at each step: top left, top right, bottom left, bottom right.
        children: (B, D) int64, the child taken, 0 ... 3.
        blocks: (B, D, 2) int64, its row and column among the 2^d x 2^d blocks of depth d = 1 ... D.
    """

    scores: Tensor
    children: Tensor
    blocks: Tensor


def check_tree(model: ImageModel) -> Nest:
    """The model, if it has a tree.

    Raises:
        UserError: it is no NesT, or one without levels to choose between.
    """
    if not isinstance(model, Nest):
        raise UserError(f"GradCAT walks down the nested blocks of a NesT; this model is a {type(model).__name__}")
    if len(model.levels) < 2:
        raise UserError("GradCAT walks from level to level; this NesT has one (model.options.num_levels)")
    if model.block_size < 2:
        raise UserError("GradCAT compares the quadrants of a block; the blocks of this NesT are single tokens")
    return model


def grow_tree(
    model: Nest,
    images: Tensor,
    classes: Tensor | None = None,
    sign: int = 1,
    before_norm: bool = False,
    channel_weights: bool = False,
) -> Tree:
    """Score all nodes, with one forward and one backward pass for all images.

    Args:
        model: in evaluation mode, so that images don't depend on each other; see `check_tree`.
        images: (B, C, S, S), as the model takes them.
        classes: (B,) int64; None: the predicted ones.
        sign: +1 or -1, see above.
        before_norm: take the last map before the final LayerNorm.
        channel_weights: average gradients over the cells, see above.
    """
    tapped = [*model.levels[1:]] if before_norm else [*model.levels[1:-1], model.norm]
    planes: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _m, _x, plane: planes.append(plane)) for module in tapped]
    try:
        with torch.enable_grad():
            logits = model(images.detach().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    classes = logits.argmax(1) if classes is None else classes
    gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), planes)
    with torch.no_grad():
        if channel_weights:
            gradients = tuple(g.mean(tuple(range(1, g.ndim - 1)), keepdim=True) for g in gradients)
        products = [sign * (plane * gradient).mean(-1) for plane, gradient in zip(planes, gradients, strict=True)]
        products[-1] = products[-1].reshape(-1, model.block_size, model.block_size)  # a LayerNorm sees a sequence
        depths = range(len(planes), 0, -1)
        scores = [_cells(product, 2**depth) for product, depth in zip(products, depths, strict=True)]
    return Tree(logits.detach(), classes, scores[::-1])


def descend(tree: Tree) -> Path:
    """Walk from the root to a leaf, always to the child of the highest score."""
    images = torch.arange(len(tree.classes), device=tree.classes.device)
    row = column = torch.zeros_like(tree.classes)
    down, right = (torch.tensor(offset, device=row.device) for offset in ([0, 0, 1, 1], [0, 1, 0, 1]))
    scores, children, blocks = [], [], []
    for grid in tree.scores:
        rows, columns = 2 * row[:, None] + down, 2 * column[:, None] + right
        scores.append(grid[images[:, None], rows, columns])
        children.append(scores[-1].argmax(1))
        row, column = rows[images, children[-1]], columns[images, children[-1]]
        blocks.append(torch.stack([row, column], 1))
    return Path(torch.stack(scores, 1), torch.stack(children, 1), torch.stack(blocks, 1))


def sum_cells(plane: Tensor, cells: int) -> Tensor:
    """Sum over each of cells x cells equal squares: (B, H, W) -> (B, cells, cells)."""
    return _cells(plane, cells) * (plane.shape[-1] / cells) ** 2


def _cells(plane: Tensor, cells: int) -> Tensor:
    """Mean over each of cells x cells equal squares: (B, H, W) -> (B, cells, cells).

    In a block of odd side the squares share the tokens in the middle: every token is cut in four.
    """
    quarters = plane[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.avg_pool2d(quarters, quarters.shape[-1] // cells)[:, 0]
