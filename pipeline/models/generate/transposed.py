"""The transposed NesT: the hierarchy run backwards, from a latent to an image.

NesT, arXiv 2105.12723, section on generation. From the paper: a latent becomes one block of n tokens, every level has
four times the blocks of the one before and the same n, and pixel shuffle enlarges the plane between levels. Its widths,
depths and heads are not published with code; the defaults are our own, with the latent of the same authors' HiT-GAN
(arXiv 2106.07631) and the four heads at every level of TransGAN (arXiv 2102.07074).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from pipeline.models.attention import Attention
from pipeline.models.errors import check_choice, check_positive
from pipeline.models.generate.base import Generator
from pipeline.models.generate.deaggregate import Deaggregate, Deaggregation, pixel_shuffle
from pipeline.models.layers import EncoderLayer, Gelu, Mlp, hidden_width, truncated_normal_
from pipeline.models.nest import INIT_STD, NORM_EPS, AttentionKind, NestLevel, PosEmbed, block_side, per_level

Attend = Literal["block", "plane"]


class TransposedNest(Generator):
    """(B, latent_dim) -> images (B, channels, img_size, img_size), not cut off.

    The block side is img_size / (patch_size · 2^(num_levels-1)) tokens at every level; level i has 4^i blocks.

    Args:
        img_size, channels: of the image.
        latent_dim: length of a latent.
        patch_size: side of a token of the last level in pixels.
        num_levels: levels of the hierarchy.
        embed_dims, depths, num_heads: channels, encoder layers and heads per level, from the latent to the pixels; one
            integer stands for every level; a depth may be 0.
        attention: "mha", or "mqa": one key and value for all heads.
        attend: "block": inside of blocks; "plane": every token to every other, which with the rest the same is the
            generator of TransGAN (arXiv 2102.07074) and has as many parameters.
        mlp_ratio: hidden width of an MLP over its channels.
        gelu: "tanh" or "erf".
        deaggregation: how one block becomes four; "pixel_shuffle" or another of `Deaggregate`.
        pos_embed: "block": every block has its own position embedding; "shared": one for all of a level.

    Raises:
        ModelError: sizes that don't fit together, or an unknown choice.
    """

    def __init__(
        self,
        img_size: int = 64,
        channels: int = 3,
        latent_dim: int = 256,
        patch_size: int = 1,
        num_levels: int = 4,
        embed_dims: int | Sequence[int] = (384, 192, 96, 48),
        depths: int | Sequence[int] = (2, 2, 2, 4),
        num_heads: int | Sequence[int] = 4,
        attention: AttentionKind = "mha",
        attend: Attend = "block",
        mlp_ratio: float = 4.0,
        gelu: Gelu = "tanh",
        deaggregation: Deaggregation = "pixel_shuffle",
        pos_embed: PosEmbed = "block",
    ) -> None:
        super().__init__(img_size, channels, latent_dim)
        check_choice("attention", attention, AttentionKind)
        check_choice("attend", attend, Attend)
        check_choice("gelu", gelu, Gelu)
        check_choice("pos_embed", pos_embed, PosEmbed)
        check_positive(mlp_ratio=mlp_ratio)
        self.block_size = block_side(img_size, patch_size, num_levels)
        self.patch_size = patch_size
        dims = per_level("embed_dims", embed_dims, num_levels)
        heads = per_level("num_heads", num_heads, num_levels)

        self.from_latent = nn.Linear(latent_dim, self.block_size**2 * dims[0])
        self.levels = nn.ModuleList()
        for i, depth in enumerate(per_level("depths", depths, num_levels, minimum=0)):
            side = self.block_size * (2**i if attend == "plane" else 1)
            blocks = 4**i if attend == "block" and pos_embed == "block" else 1
            grow = Deaggregate(deaggregation, dims[i - 1], dims[i]) if i else nn.Identity()
            layers = [
                EncoderLayer(
                    dims[i],
                    Attention(dims[i], heads[i], multi_query=attention == "mqa"),
                    Mlp(dims[i], hidden_width(dims[i], mlp_ratio), act=gelu),
                    drop_path=0.0,
                    norm_eps=NORM_EPS,
                )
                for _ in range(depth)
            ]
            self.levels.append(NestLevel(grow, layers, blocks, side, dims[i]))
        self.norm = nn.LayerNorm(dims[-1], eps=NORM_EPS)
        self.to_pixels = nn.Linear(dims[-1], patch_size**2 * channels)
        for name, param in self.named_parameters():
            if param.ndim > 1:
                truncated_normal_(param, INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(param)
        # Not NesT's init: from so small weights, biases and position embeddings outgrow what comes of the latent, and
        # all images become one. So the first tokens are as large as the latents.
        nn.init.normal_(self.from_latent.weight, std=latent_dim**-0.5)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, latent_dim) -> (B, channels, img_size, img_size)."""
        x = self.from_latent(latents).unflatten(-1, (self.block_size, self.block_size, -1))
        for level in self.levels:
            x = level(x, self.grad_checkpointing)
        return pixel_shuffle(self.to_pixels(self.norm(x)), self.patch_size).permute(0, 3, 1, 2)
