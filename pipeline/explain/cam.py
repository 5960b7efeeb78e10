"""Class activation maps: what each place of the last feature map adds to a logit.

Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, arXiv 1512.04150.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models import ImageModel
from pipeline.models.nest import Nest


def check_cam(model: ImageModel) -> Nest:
    """The model, if its logits are a mean over the places of a map.

    Raises:
        UserError: they are not.
    """
    if not isinstance(model, Nest):
        raise UserError(
            f"CAM needs logits that are a mean over the places of a map, as NesT has; this is a {type(model).__name__}"
        )
    return model


@torch.no_grad()
def class_activation(model: Nest, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """CAM_c(i, j) = w_c · x(i, j), with x the normalised tokens of the last level and w_c the weights of the head.

    The logit is the mean of the map plus the bias of the class.

    Args:
        model: in evaluation mode.
        images: (B, C, S, S).
        classes: (B,) int64; None: the predicted ones.

    Returns:
        Logits (B, K), the classes (B,), and the maps (B, p, p) of p x p tokens.
    """
    tokens = model.forward_features(images)
    logits = model.forward_head(tokens)
    classes = logits.argmax(1) if classes is None else classes
    maps = torch.einsum("bnc,bc->bn", tokens, model.head.weight[classes])  # type: ignore[index]
    return logits, classes, maps.unflatten(1, (model.block_size, -1))


def enlarged(maps: Tensor, side: int) -> Tensor:
    """Maps at the size of the image, bilinear: (B, p, q) -> (B, side, side)."""
    return F.interpolate(maps[:, None].float(), size=(side, side), mode="bilinear", align_corners=False)[:, 0]
