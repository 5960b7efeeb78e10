"""The names that `rookery explain` knows, free of torch: the command line reads them before anything is loaded."""

from __future__ import annotations

from enum import StrEnum


class Method(StrEnum):
    """How to explain."""

    gradcat = "gradcat"
    cam = "cam"
    rollout = "rollout"
    similarity = "similarity"


class Scores(StrEnum):
    """What GradCAT's tree is scored with.

    Attributes:
        conductance: what the logit loses while parts of the picture fade, see `conduct_tree`.
        occlusion: what the logit loses without a block, see `occlude_tree`.
        gradient: map times gradient, the paper's Algorithm 1 as it is understood, see `grow_tree`.
        channel_weights: the same with the weights of Grad-CAM.
    """

    conductance = "conductance"
    occlusion = "occlusion"
    gradient = "gradient"
    channel_weights = "channel-weights"
