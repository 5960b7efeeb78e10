"""GradCAT's tree by the name of its scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from pipeline.explain.conductance import conduct_tree
from pipeline.explain.gradcat import Tree, grow_tree
from pipeline.explain.names import Scores
from pipeline.explain.occlusion import occlude_tree
from pipeline.models.nest import Nest

# Those that put a plain colour into the picture, and those that read one gradient of the picture as it is.
FADING: dict[Scores, Callable[..., Tree]] = {Scores.conductance: conduct_tree, Scores.occlusion: occlude_tree}
LOCAL: dict[Scores, Callable[..., Tree]] = {
    Scores.gradient: grow_tree,
    Scores.channel_weights: partial(grow_tree, channel_weights=True),
}


def score_tree(
    scores: Scores,
    model: Nest,
    images: Tensor,
    classes: Tensor | None = None,
    sign: int = 1,
    plain: Tensor | None = None,
) -> Tree:
    """Score all nodes.

    Args:
        scores: with what.
        model: in evaluation mode; see `check_tree`.
        images: (B, C, S, S), as the model takes them.
        classes: (B,) int64; None: the predicted ones.
        sign: +1: high scores raise the logit; -1: the opposite.
        plain: (C,) colour to fade to, normalised as the images are; None: 0, the mean that normalisation takes away.
            Of no use to scores that don't fade.
    """
    if scores in FADING:
        return FADING[scores](model, images, classes, sign, plain)
    return LOCAL[scores](model, images, classes, sign)
