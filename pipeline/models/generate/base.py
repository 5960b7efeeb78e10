"""What every generator of images offers to the code that trains it, measures it and draws with it."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.models.errors import check_ints


class Generator(nn.Module):
    """Latents to images: (B, latent_dim) -> (B, channels, img_size, img_size).

    Real images go from -1 to 1. What `forward` returns may leave that range, which training needs for its gradients;
    `images` cuts it off.

    Attributes:
        img_size: side of the image in pixels.
        channels: of the image.
        latent_dim: length of a latent, drawn from N(0, 1).
        grad_checkpointing: whether encoder layers are recomputed in the backward pass.
    """

    def __init__(self, img_size: int, channels: int, latent_dim: int) -> None:
        super().__init__()
        check_ints(1, img_size=img_size, channels=channels, latent_dim=latent_dim)
        self.img_size = img_size
        self.channels = channels
        self.latent_dim = latent_dim
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each encoder layer for the backward pass and recompute the rest."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed."""
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed")}

    def forward(self, latents: Tensor) -> Tensor:
        """(B, latent_dim) -> (B, channels, img_size, img_size)."""
        raise NotImplementedError

    def images(self, latents: Tensor) -> Tensor:
        """(B, latent_dim) -> float32 images in [-1, 1]."""
        return self(latents).float().clamp(-1, 1)
