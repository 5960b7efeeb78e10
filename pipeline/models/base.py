"""What every architecture offers to the code that trains, evaluates and exports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from pipeline.models.errors import check_ints


class ImageModel(nn.Module):
    """An image classifier: (B, in_chans, img_size, img_size) -> logits (B, num_classes).

    Attributes:
        img_size: side of the input in pixels.
        in_chans: channels of the input.
        num_classes: classes of the head; 0: no head, `forward` returns pooled features.
        grad_checkpointing: whether layers are recomputed in the backward pass.
    """

    def __init__(self, img_size: int, in_chans: int, num_classes: int) -> None:
        super().__init__()
        check_ints(1, img_size=img_size, in_chans=in_chans)
        check_ints(0, num_classes=num_classes)
        self.img_size = img_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each encoder layer for the backward pass and recompute the rest."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the official recipe doesn't decay."""
        raise NotImplementedError

    def in_order(self) -> list[nn.Module | nn.Parameter]:
        """Modules and parameters in the order in which a forward pass meets them; each parameter in one of them.

        Encoder layers stand in it one by one, so that `layer_numbers` can count them.
        """
        raise NotImplementedError

    def fit_pos_embed(
        self, name: str, state_dict: Mapping[str, Tensor], mode: Literal["bicubic", "bilinear"]
    ) -> Tensor | None:
        """The position embedding `name` of a state dict for another image size, resized for this model.

        Returns:
            A tensor of the shape of this model's own, or None if the two can't be matched; see `resize_pos_embed`.
        """
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, img_size, img_size) -> normalised tokens before pooling, (B, N, C)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens (B, N, C) and classify them, or return the pooled features (B, C) with `pre_logits`."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, img_size, img_size) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))
