"""GradCAT's tree with scores that add up: what the logit loses on the way while parts of the picture fade.

GradCAT multiplies a map by the gradient at the picture. That gradient says little where the logit is saturated, and
nothing of how large a map is where a LayerNorm follows, and the maps of the higher levels have mixed what their blocks
held. Here the picture x fades towards a plain one x_0, but only in a quarter of the leaves at a time: in every other
leaf of every other row. With M_g 1 in the leaves of the g-th quarter, 0 elsewhere,

    x_t = x + t M_g (x_0 - x),   A_t the map of the first level, Y_t the logit,

and a place p of that map has what the logit loses there on the way,

    s(p) = -∫ Σ_channels ∂Y_t/∂A_t(p) · dA_t(p)/dt dt

(conductance: Dhamdhere et al., arXiv 1805.12233, after integrated gradients, arXiv 1703.01365, whose way fades the
whole picture). The blocks of the first level don't see each other, so what is not 0 lies in the leaves of the quarter,
and adds up to what the logit loses without them. The score of a node is the sum over its places: children add up to
their parent, and `descend` walks down as ever.

Why not the whole picture at once: the question is what a block does in this picture. Where all of it has faded, the
gradient answers for another one.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from pipeline.explain.gradcat import Tree, sum_cells
from pipeline.models.nest import Nest

STEPS = 4


def conduct_tree(
    model: Nest,
    images: Tensor,
    classes: Tensor | None = None,
    sign: int = 1,
    plain: Tensor | None = None,
    steps: int = STEPS,
) -> Tree:
    """Score all nodes, with 4 `steps` + 1 forward and backward passes for all images.

    Args:
        model: in evaluation mode; see `check_tree`.
        images: (B, C, S, S), as the model takes them.
        classes: (B,) int64; None: the predicted ones.
        sign: +1 or -1, which all scores are multiplied with.
        plain: (C,) colour of x_0, normalised as the images are; None: 0, the mean that normalisation takes away.
        steps: parts of each integral, by the trapezoidal rule.
    """
    with torch.no_grad():
        logits = model(images)
    classes = logits.argmax(1) if classes is None else classes
    end = torch.zeros_like(images) if plain is None else plain.to(images)[:, None, None].expand_as(images)
    whole = _map_and_gradient(model, images, classes)
    shares = torch.zeros_like(whole[0][..., 0])
    for quarter in quarters(images.shape[-1], len(model.levels)):
        before = whole
        for step in range(1, steps + 1):
            # Closer near the plain colour, where LayerNorms turn a little contrast into a lot.
            faded = 1 - (1 - step / steps) ** 2
            now = _map_and_gradient(model, torch.lerp(images, end, faded * quarter.to(images)), classes)
            shares += ((now[1] + before[1]) / 2 * (before[0] - now[0])).sum(-1)
            before = now
    return Tree(logits, classes, [sign * sum_cells(shares, 2**depth) for depth in range(1, len(model.levels))])


def quarters(side: int, levels: int) -> list[Tensor]:
    """Four (side, side) masks: which pixels are in every other leaf of every other row of leaves."""
    odd = torch.arange(side) * 2 ** (levels - 1) // side % 2
    return [(odd == row)[:, None] & (odd == column) for row, column in product((0, 1), repeat=2)]


def _map_and_gradient(model: Nest, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The map of the first level and the gradient of the classes' logits with respect to it: (B, H, W, C) each."""
    planes: list[Tensor] = []
    hook = model.levels[0].register_forward_hook(lambda _m, _x, plane: planes.append(plane))
    try:
        with torch.enable_grad():
            logits = model(images.detach().requires_grad_())
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), planes)
    return planes[0].detach(), gradient
