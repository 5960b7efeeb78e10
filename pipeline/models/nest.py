"""NesT, the nested hierarchical transformer, as in the authors' code.

Zhang et al., "Nested Hierarchical Transformer: Towards Accurate, Data-Efficient and Interpretable Visual
Understanding", AAAI 2022, arXiv 2105.12723. Official code: `models/nest_net.py` and `libml/self_attention.py` of
google-research/nested-transformer. Where Table A1 of the paper disagrees with it (order of widths and depths, heads)
the code is right, as the authors confirmed.

Shapes: B images, T blocks of n = block_size² tokens, C channels, (H, W) the image plane in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.models.aggregate import Aggregate, Aggregation, Plane, PoolPad
from pipeline.models.base import ImageModel
from pipeline.models.block_attention import TOKENS, check_block_attention
from pipeline.models.blocks import blockify, unblockify
from pipeline.models.drop_path import drop_path_rates
from pipeline.models.errors import ModelError, check_choice, check_ints, check_positive, check_rates
from pipeline.models.kernels import Kernels
from pipeline.models.layers import EncoderLayer, Gelu, MapLayer, Mlp, hidden_width, run_layers, truncated_normal_
from pipeline.models.pos_embed import Mode, resize_blocks
from pipeline.models.refine import Refine, make_attention, map_uses
from pipeline.models.registry import ModelInfo, register

NORM_EPS = 1e-6
INIT_STD = 0.02

AttentionKind = Literal["mha", "mqa"]
PosEmbed = Literal["block", "shared"]
Init = Literal["official", "timm"]


class NestLevel(nn.Module):
    """One level of the hierarchy: aggregation (identity in the first), position embedding, encoder layers.

    The layers are shared by the blocks, the position embedding is not: it differs for every block and token. One of
    shape (1, 1, n, C) is shared by the blocks as well.
    """

    def __init__(
        self, aggregate: nn.Module, layers: Sequence[nn.Module], pos_blocks: int, block_size: int, dim: int
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.aggregate = aggregate
        self.pos_embed = nn.Parameter(torch.zeros(1, pos_blocks, block_size**2, dim))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, grad_checkpointing: bool = False) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C'), the plane after the encoder layers."""
        x = blockify(self.aggregate(x), self.block_size) + self.pos_embed
        return unblockify(run_layers(self.layers, x, grad_checkpointing))


class Nest(ImageModel):
    """NesT for square images: (B, in_chans, img_size, img_size) -> logits (B, num_classes).

    The block side follows from the sizes: img_size / (patch_size · 2^(num_levels-1)) tokens, the same at every level,
    so that the last level is one block.

    Args:
        img_size: side of the image in pixels.
        in_chans: channels of the image.
        num_classes: width of the head; 0: no head, `forward` returns the pooled features.
        patch_size: side of a token in pixels.
        num_levels: levels of the hierarchy; level i has 4^(num_levels-1-i) blocks.
        embed_dims, depths, num_heads: channels, encoder layers and heads per level, from the pixels up; one integer
            stands for every level; a depth may be 0.
        attention: "mha", or "mqa": one key and value for all heads (the CIFAR models).
        mlp_ratio: hidden width of an MLP over its channels.
        drop_path_rate: stochastic depth of the last layer; the rates rise linearly from 0 at the first.
        drop_rate: dropout after the attention projection and in the MLP.
        attn_drop_rate: dropout of attention weights.
        gelu: "tanh" (official) or "erf".
        aggregation: how four blocks become one; "conv_pool" (official) or another of `Aggregate`.
        aggregation_plane: "image" (official): windows cross the borders of the four blocks; "block": they don't.
        pos_embed: "block" (official): every block has its own position embedding; "shared": one for all of a level.
        refine: refine the attention maps of some layers (`Refine`), or None.
        pool_pad: "same" (official) or "symmetric".
        init: "official": normal of std 0.02 cut at two standard deviations; "timm": the same, not cut. For every kernel
            and position embedding; biases 0.
        kernels: "torch", or "triton": on a GPU `fused_mlp`, `sum_norm`, and `block_attention` in blocks of 16 or 64
            tokens, `short_attention` in others of up to 256.

    Raises:
        ModelError: sizes that don't fit together, or an unknown choice.
    """

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 4,
        num_levels: int = 3,
        embed_dims: int | Sequence[int] = (96, 192, 384),
        depths: int | Sequence[int] = (2, 2, 8),
        num_heads: int | Sequence[int] = (3, 6, 12),
        attention: AttentionKind = "mha",
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        gelu: Gelu = "tanh",
        aggregation: Aggregation = "conv_pool",
        aggregation_plane: Plane = "image",
        pos_embed: PosEmbed = "block",
        refine: Refine | Mapping[str, Any] | None = None,
        pool_pad: PoolPad = "same",
        init: Init = "official",
        kernels: Kernels = "torch",
    ) -> None:
        super().__init__(img_size, in_chans, num_classes)
        check_choice("attention", attention, AttentionKind)
        check_choice("gelu", gelu, Gelu)
        check_choice("pos_embed", pos_embed, PosEmbed)
        check_choice("pool_pad", pool_pad, PoolPad)
        check_choice("init", init, Init)
        check_choice("kernels", kernels, Kernels)
        check_positive(mlp_ratio=mlp_ratio)
        check_rates(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate)
        self.block_size = block_side(img_size, patch_size, num_levels)
        self.attention = attention
        self.num_heads = per_level("num_heads", num_heads, num_levels)
        dims = per_level("embed_dims", embed_dims, num_levels)
        layer_counts = per_level("depths", depths, num_levels, minimum=0)
        multi_query = attention == "mqa"
        rates = iter(drop_path_rates(drop_path_rate, sum(layer_counts)))
        self.refine = Refine.of(refine)
        uses = iter(map_uses(self.refine, layer_counts))
        dropout = {"attn_drop": attn_drop_rate, "proj_drop": drop_rate}

        self.patch_embed = nn.Conv2d(in_chans, dims[0], kernel_size=patch_size, stride=patch_size)
        self.levels = nn.ModuleList()
        for i, dim in enumerate(dims):
            layers = []
            if kernels == "triton" and self.block_size**2 in TOKENS:
                check_block_attention(dim // self.num_heads[i])
            for _ in range(layer_counts[i]):
                use = next(uses)
                attn = make_attention(
                    use, self.refine, dim, self.num_heads[i], multi_query=multi_query, kernels=kernels, **dropout
                )
                mlp = Mlp(dim, hidden_width(dim, mlp_ratio), act=gelu, drop=drop_rate, kernels=kernels)
                layer = MapLayer if use.explicit else EncoderLayer
                layers.append(layer(dim, attn, mlp, drop_path=next(rates), norm_eps=NORM_EPS))
            aggregate: nn.Module = nn.Identity()
            if i:
                aggregate = Aggregate(aggregation, dims[i - 1], dim, aggregation_plane, self.block_size, pool_pad)
            pos_blocks = 4 ** (num_levels - 1 - i) if pos_embed == "block" else 1
            self.levels.append(NestLevel(aggregate, layers, pos_blocks, self.block_size, dim))
        self.norm = nn.LayerNorm(dims[-1], eps=NORM_EPS)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self._init_weights(init)

    def _init_weights(self, init: Init) -> None:
        for name, param in self.named_parameters():
            if ".refiner." in name:
                continue  # Refiner's code leaves the convolutions on maps as torch fills them
            if param.ndim > 1 and init == "official":
                truncated_normal_(param, INIT_STD)
            elif param.ndim > 1:
                nn.init.normal_(param, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def no_weight_decay(self) -> set[str]:
        """Parameters the official recipe doesn't decay: the position embeddings. Biases and LayerNorms are decayed."""
        return {f"levels.{i}.pos_embed" for i in range(len(self.levels))}

    def in_order(self) -> list[nn.Module | nn.Parameter]:
        """See `ImageModel`."""
        parts: list[nn.Module | nn.Parameter] = [self.patch_embed]
        for level in self.levels:
            parts += [level.aggregate, level.pos_embed, *level.layers]  # type: ignore[list-item,misc]
        return [*parts, self.norm, self.head]

    def fit_pos_embed(self, name: str, state_dict: Mapping[str, Tensor], mode: Mode) -> Tensor | None:
        """Each block by itself while their number stays, else the image plane as a whole; see `resize_blocks`."""
        blocks, old_blocks = self.get_parameter(name).shape[1], state_dict[name].shape[1]
        if (blocks == 1) != (old_blocks == 1) and name != f"levels.{len(self.levels) - 1}.pos_embed":
            return None  # one is shared by the blocks, the other is not
        return resize_blocks(state_dict[name], blocks, self.block_size, mode)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, img_size, img_size) -> normalised tokens of the last level in raster order, (B, n, C)."""
        expected = (self.in_chans, self.img_size, self.img_size)
        if images.shape[1:] != expected:
            raise ModelError(f"this NesT takes images of shape {expected}, got {tuple(images.shape[1:])}")
        x = self.patch_embed(images).permute(0, 2, 3, 1)
        for level in self.levels:
            x = level(x, self.grad_checkpointing)
        return self.norm(x.flatten(1, 2))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the tokens, then the classifier (left out with `pre_logits`): (B, n, C) -> (B, num_classes)."""
        x = x.mean(dim=1)
        return x if pre_logits else self.head(x)


def block_side(img_size: int, patch_size: int, num_levels: int) -> int:
    """Side of a block in tokens, so that 2^(num_levels-1) blocks fill one side of the image."""
    check_ints(1, img_size=img_size, patch_size=patch_size, num_levels=num_levels)
    unit = patch_size * 2 ** (num_levels - 1)
    below = img_size // unit * unit
    if below != img_size:
        nearest = f"{below} or {below + unit}" if below else str(unit)
        raise ModelError(
            f"img_size={img_size} can't be cut into blocks: with patch_size={patch_size} and num_levels={num_levels} "
            f"it must be a multiple of patch_size * 2^(num_levels-1) = {unit}; nearest: {nearest}"
        )
    return img_size // unit


def per_level(option: str, value: int | Sequence[int], num_levels: int, minimum: int = 1) -> tuple[int, ...]:
    values = (value,) * num_levels if isinstance(value, int) else value
    if not isinstance(values, list | tuple):
        raise ModelError(f"{option}={value!r} is neither an integer nor a list of them, one for each level")
    values = tuple(values)
    if len(values) != num_levels:
        raise ModelError(
            f"{option} has {len(values)} entries for num_levels={num_levels}: give one each, or one integer"
        )
    if not all(type(v) is int and v >= minimum for v in values):
        raise ModelError(f"{option}={value!r} holds something else than integers of at least {minimum}")
    return values


_PAPER = "NesT 2105.12723"
_README = "official README"
_IMAGENET: dict[str, Any] = {"img_size": 224, "patch_size": 4, "num_levels": 3, "num_classes": 1000}
_CIFAR: dict[str, Any] = {"img_size": 32, "patch_size": 1, "num_levels": 4, "num_classes": 10, "depths": 3}
_CIFAR |= {"attention": "mqa", "drop_path_rate": 0.1}

_VARIANTS: dict[str, dict[str, Any]] = {
    "nest_tiny": _IMAGENET
    | {"embed_dims": (96, 192, 384), "depths": (2, 2, 8), "num_heads": (3, 6, 12), "drop_path_rate": 0.2},
    "nest_small": _IMAGENET
    | {"embed_dims": (96, 192, 384), "depths": (2, 2, 20), "num_heads": (3, 6, 12), "drop_path_rate": 0.3},
    "nest_base": _IMAGENET
    | {"embed_dims": (128, 256, 512), "depths": (2, 2, 20), "num_heads": (4, 8, 16), "drop_path_rate": 0.5},
    "nest_tiny_cifar": _CIFAR | {"embed_dims": 192, "num_heads": 3},
    "nest_small_cifar": _CIFAR | {"embed_dims": 384, "num_heads": 6},
    "nest_base_cifar": _CIFAR | {"embed_dims": 768, "num_heads": 12},
    # Not of the paper: small enough to train on a laptop's processor.
    "nest_micro": {"img_size": 16, "patch_size": 1, "num_levels": 3, "num_classes": 10}
    | {"embed_dims": (32, 64, 96), "depths": 2, "num_heads": (1, 2, 3), "drop_path_rate": 0.1},
}
_REPORTED: dict[str, dict[str, Any]] = {
    "nest_tiny": {"top1": 81.5, "dataset": "ImageNet-1k", "source": _README},
    "nest_small": {"top1": 83.3, "dataset": "ImageNet-1k", "source": _README},
    "nest_base": {"top1": 83.8, "dataset": "ImageNet-1k", "source": _README},
    "nest_tiny_cifar": {"top1": 96.0, "dataset": "CIFAR-10", "source": "abstract"},
    "nest_base_cifar": {"top1": 97.2, "dataset": "CIFAR-10", "source": "leaderboard"},
    "nest_micro": {"source": "a small one for demonstrations"},
}
for _name, _config in _VARIANTS.items():
    register(ModelInfo(_name, "nest", Nest, _config, _PAPER, **_REPORTED.get(_name, {})))
