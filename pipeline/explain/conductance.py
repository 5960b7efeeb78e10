"""GradCAT's tree with scores that add up: each block's share of the logit.

GradCAT multiplies a map by the gradient at the picture. That gradient says little where the logit is saturated, and
nothing of how large a map is where a LayerNorm follows, and the maps of the higher levels have mixed what their blocks
held. Here the picture x fades in from a plain one x_0,

    x_t = x_0 + t (x - x_0),   A_t the map of the first level, Y_t the logit,

and a place p of that map has what it contributes to the logit on the way,

    s(p) = ∫ Σ_channels ∂Y_t/∂A_t(p) · dA_t(p)/dt dt

(conductance: Dhamdhere et al., arXiv 1805.12233, after integrated gradients, arXiv 1703.01365). The score of a node is
the sum over its places. So children add up to their parent, and the root to Y_1 - Y_0; `descend` walks down as ever.
The integral is a sum by the trapezoidal rule, over points that lie closer near the plain picture, where LayerNorms turn
a little contrast into a lot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.explain.gradcat import Tree, sum_cells
from pipeline.models.nest import Nest

# With as many the shares add up to the logit to a few percent (0.6 % on trained digits, 2 to 7 % on random networks).
STEPS = 16


def conduct_tree(
    model: Nest,
    images: Tensor,
    classes: Tensor | None = None,
    sign: int = 1,
    plain: Tensor | None = None,
    steps: int = STEPS,
) -> Tree:
    """Score all nodes, with `steps` + 1 forward and backward passes for all images.

    Args:
        model: in evaluation mode; see `check_tree`.
        images: (B, C, S, S), as the model takes them.
        classes: (B,) int64; None: the predicted ones.
        sign: +1 or -1, which all scores are multiplied with.
        plain: (C,) colour of x_0, normalised as the images are; None: 0, the mean that normalisation takes away.
        steps: parts of the integral.
    """
    with torch.no_grad():
        logits = model(images)
    classes = logits.argmax(1) if classes is None else classes
    start = torch.zeros_like(images) if plain is None else plain.to(images)[:, None, None].expand_as(images)
    shares: Tensor | None = None
    before: tuple[Tensor, Tensor] | None = None
    for step in range(steps + 1):
        now = _map_and_gradient(model, torch.lerp(start, images, (step / steps) ** 2), classes)
        if before is not None:
            part = ((now[1] + before[1]) / 2 * (now[0] - before[0])).sum(-1)
            shares = part if shares is None else shares + part
        before = now
    assert shares is not None, "one step at least"
    return Tree(logits, classes, [sign * sum_cells(shares, 2**depth) for depth in range(1, len(model.levels))])


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
