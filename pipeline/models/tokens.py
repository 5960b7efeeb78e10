"""The trunk of HVT and Refiner: one sequence of patch tokens, encoder layers, pools between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.base import ImageModel
from pipeline.models.drop_path import drop_path_rates
from pipeline.models.errors import ModelError, check_choice, check_ints, check_positive, check_rates
from pipeline.models.kernels import Kernels
from pipeline.models.layers import EncoderLayer, MapLayer, Mlp, hidden_width, normal_, run_layer
from pipeline.models.pool import Pool
from pipeline.models.pos_embed import Mode, resize_grid, resize_plane, resize_raster
from pipeline.models.refine import Refine, make_attention, map_uses

NORM_EPS = 1e-6
INIT_STD = 0.02


class Pooling(nn.Module):
    """A pool and the position embedding that its shorter sequence gets. A class token passes by untouched.

    Attributes:
        pos_embed: (1, N', C), one vector for each pooled token; None without.
    """

    def __init__(self, pool: nn.Module, length: int, dim: int, pos_embed: bool, class_token: bool) -> None:
        super().__init__()
        self.pool = pool
        self.class_token = class_token
        self.pos_embed = nn.Parameter(torch.zeros(1, length, dim)) if pos_embed else None
        if self.pos_embed is not None:
            normal_(self.pos_embed, INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N', C)."""
        first, rest = (x[:, :1], x[:, 1:]) if self.class_token else (None, x)
        rest = self.pool(rest)
        if self.pos_embed is not None:
            rest = rest + self.pos_embed
        return rest if first is None else torch.cat([first, rest], dim=1)


class TokenTransformer(ImageModel):
    """Patch tokens with learned positions, pre-norm encoder layers, pooling between them, a final LayerNorm.

    Args:
        img_size, in_chans, num_classes: as for every model.
        stem: (B, in_chans, S, S) -> (B, C, s, s).
        patch_size: side of a token in pixels, S / s.
        dim, depth, num_heads, mlp_ratio: channels C, layers, heads, hidden width of an MLP over C.
        class_token: prepend a learned token.
        pool: where and how tokens are pooled.
        pool_pos_embed: whether the sequence gets a new position embedding after each pool.
        refine: which layers refine attention maps; None: none.
        residual_scale, layer_scale: see `EncoderLayer` and `Mlp`.
        drop_path_rate, drop_rate, attn_drop_rate: as in `Nest`; `drop_rate` also acts after the position embedding.
        kernels: "torch", or "triton": `fused_mlp`, `sum_norm` and `short_attention` on a GPU.
    """

    def __init__(
        self,
        img_size: int,
        in_chans: int,
        num_classes: int,
        *,
        stem: nn.Module,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        class_token: bool,
        pool: Pool,
        pool_pos_embed: bool,
        refine: Refine | None,
        residual_scale: float,
        layer_scale: float | None,
        drop_path_rate: float,
        drop_rate: float,
        attn_drop_rate: float,
        kernels: Kernels,
    ) -> None:
        super().__init__(img_size, in_chans, num_classes)
        check_choice("kernels", kernels, Kernels)
        check_ints(1, depth=depth)
        check_positive(mlp_ratio=mlp_ratio, residual_scale=residual_scale)
        check_rates(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate)
        side = token_side(img_size, patch_size)
        self.patch_size = patch_size
        self.pooled_layers = pool.layers(depth)
        grids = pool.grids(side, depth)
        self.pool_options = pool
        self.refine = refine
        self.token_grid = side if not grids else None
        uses = map_uses(refine, _runs(self.pooled_layers, depth))
        if refine is not None and refine.local != "raster":
            _check_planes(refine.local, [use.refined for use in uses], self.pooled_layers, grids)
        rates = drop_path_rates(drop_path_rate, depth)

        self.patch_embed = stem
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + int(class_token), dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList()
        self.pools = nn.ModuleDict()
        grid = (side, side)
        for i, (use, rate) in enumerate(zip(uses, rates, strict=True)):
            attn = make_attention(
                use, refine, dim, num_heads, attn_drop=attn_drop_rate, proj_drop=drop_rate, kernels=kernels
            )
            hidden = hidden_width(dim, mlp_ratio)
            mlp = Mlp(dim, hidden, act="erf", drop=drop_rate, layer_scale=layer_scale, kernels=kernels)
            kind = MapLayer if use.explicit else EncoderLayer
            self.blocks.append(kind(dim, attn, mlp, drop_path=rate, norm_eps=NORM_EPS, residual_scale=residual_scale))
            if i in self.pooled_layers:
                before, grid = grid, grids[len(self.pools)]
                pooling = pool.make(dim, before)
                self.pools[str(i)] = Pooling(pooling, grid[0] * grid[1], dim, pool_pos_embed, class_token)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def _init_weights(self) -> None:
        """Linear layers, positions and class token: normal with std 0.02; biases 0. Convolutions keep torch's default.

        To be called when the heads are there; the order of draws is that of the official code.
        """
        normal_(self.pos_embed, INIT_STD)
        if self.cls_token is not None:
            normal_(self.cls_token, INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                normal_(module.weight, INIT_STD)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Position embeddings and class token; the recipes exempt biases and 1-D parameters by `optim.decay`."""
        names = {name for name, _ in self.named_parameters()}
        return {name for name in names if name.rpartition(".")[2] in ("pos_embed", "cls_token")}

    def in_order(self) -> list[nn.Module | nn.Parameter]:
        """See `ImageModel`; the heads are the subclass's."""
        parts: list[nn.Module | nn.Parameter] = [self.patch_embed, self.pos_embed]
        if self.cls_token is not None:
            parts.append(self.cls_token)
        for i, block in enumerate(self.blocks):
            parts.append(block)
            if i in self.pooled_layers:
                parts.append(self.pools[str(i)])
        return [*parts, self.norm]

    def fit_pos_embed(self, name: str, state_dict: Mapping[str, Tensor], mode: Mode) -> Tensor | None:
        """Grids are interpolated as grids, a class token's vector stays; see `resize_grid` and `resize_raster`."""
        side = self.img_size // self.patch_size
        extra = 0 if self.cls_token is None else 1
        if name == "pos_embed":
            return resize_grid(state_dict[name], extra, side, mode)
        if "pos_embed" not in state_dict or state_dict["pos_embed"].ndim != 3:
            return None
        old_side = isqrt(max(0, state_dict["pos_embed"].shape[1] - extra))
        depth, number = len(self.blocks), self.pooled_layers.index(int(name.split(".")[1]))
        shape = self.pool_options.grids(side, depth)[number]
        old_shape = self.pool_options.grids(old_side, depth)[number]
        if self.pool_options.dims == 2:
            return resize_plane(state_dict[name], old_shape, shape, mode)
        if state_dict[name].ndim != 3 or state_dict[name].shape[1] != old_shape[1]:
            return None  # of another kernel or stride
        step, first = self.pool_options.raster(number + 1)
        return resize_raster(state_dict[name], old_side, side, shape[1], step, first, mode)

    def tokens(self, images: Tensor) -> Tensor:
        """The stem: (B, in_chans, S, S) -> (B, C, s, s)."""
        expected = (self.in_chans, self.img_size, self.img_size)
        if images.shape[1:] != expected:
            name = type(self).__name__
            raise ModelError(f"this {name} takes images of shape {expected}, got {tuple(images.shape[1:])}")
        return self.patch_embed(images)

    def encode(self, plane: Tensor, seen: Callable[[int, Tensor | None], None] | None = None) -> Tensor:
        """Everything after the stem: (B, C, s, s) -> normalised tokens (B, N, C), the class token first if any.

        Args:
            plane: output of the stem.
            seen: called after each layer with its number and the attention maps it passes on (None without).
        """
        x = plane.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        maps: Tensor | None = None
        for i, block in enumerate(self.blocks):
            x, maps = run_layer(block, x, maps, self.grad_checkpointing)
            if seen is not None:
                seen(i, maps)
            if i in self.pooled_layers:
                x, maps = self.pools[str(i)](x), None
        return self.norm(x)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, img_size, img_size) -> normalised tokens (B, N, C), the class token first if there is one."""
        return self.encode(self.tokens(images))


def token_side(img_size: int, patch_size: int) -> int:
    """Tokens on a side of the image.

    Raises:
        ModelError: the patches don't fill the image.
    """
    check_ints(1, img_size=img_size, patch_size=patch_size)
    if img_size % patch_size:
        below = img_size // patch_size * patch_size
        nearest = f"{below} or {below + patch_size}" if below else str(patch_size)
        raise ModelError(f"img_size={img_size} is not a multiple of patch_size={patch_size}; nearest: {nearest}")
    return img_size // patch_size


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over images, queries and keys of the cosine between two sets of maps over the heads; 0-D float32.

    Official file: `loss/cross_entropy.py`, CosineSimilarity(dim=1).
    """
    return F.cosine_similarity(a.float(), b.float(), dim=1).mean()


def _check_planes(local: str, refined: Sequence[bool], pooled: Sequence[int], grids: Sequence[tuple[int, int]]) -> None:
    """Raise ModelError if the tokens of a refined layer, behind a pool, lie on no square plane."""
    for layer, grid in zip(pooled, grids, strict=True):
        if grid[0] != grid[1] and any(refined[layer + 1 :]):
            raise ModelError(
                f"refine.local={local} needs tokens on a square plane, and the pool after layer {layer} leaves "
                f"{grid[0]}x{grid[1]}: set refine.local=raster, pool_dims=2, or refine.blocks to layers before it"
            )


def _runs(pooled: Iterable[int], depth: int) -> list[int]:
    ends = [i + 1 for i in pooled]
    starts = [0, *ends]
    return [end - start for start, end in zip(starts, [*ends, depth], strict=True)]
