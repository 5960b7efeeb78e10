"""Refiner-ViT: a vision transformer that refines its attention maps.

Zhou et al., "Refiner: Refining Self-attention for Vision Transformers", 2021, arXiv 2106.03714. Official code:
`models/refined_transformer.py` of zhoudaquan/Refiner_ViT.

The released models differ from the paper's text: layers alternate between plain attention, whose maps also accumulate
those of the layers before, and attention without queries and keys that refines the maps it is handed, by convolutions
with BatchNorm and ReLU6 between. `flavour="official"` is that; `flavour="linear"` is the paper's form, in which every
layer refines its own maps linearly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.models.dense import DenseOutput, DenseRequest
from pipeline.models.errors import ModelError, check_bools, check_choice, check_ints, check_positive
from pipeline.models.kernels import Kernels
from pipeline.models.pool import Pool
from pipeline.models.refine import Flavour, Refine
from pipeline.models.refine_local import Local
from pipeline.models.refine_maps import fold_refiners
from pipeline.models.registry import ModelInfo, register
from pipeline.models.stems import ConvStem, PatchStem
from pipeline.models.tokens import TokenTransformer, cosine, token_side

Stem = Literal["conv", "patch"]


class Refiner(TokenTransformer):
    """Refiner-ViT for square images: (B, in_chans, img_size, img_size) -> logits (B, num_classes).

    Args:
        img_size, patch_size: sides of the image and of a token in pixels.
        in_chans, num_classes: channels and classes; 0 classes: no heads, `forward` returns the class token.
        embed_dim, depth, num_heads: width, encoder layers, heads.
        mlp_ratio: hidden width of an MLP over the width.
        flavour: "official" or "linear".
        expansion: attention maps after the expansion, per head.
        kernel: side of the local kernels on the maps.
        local: which places they take for neighbours: "raster" (official), "plane", "volume" or "plane_then_keys"; see
            `Refine`.
        reduction: mix the maps back to one per head (official: always).
        sharing: refined layers take the maps of the layer before and have no queries and keys; None: as the flavour
            has it (official: true, linear: false).
        blocks: the refined layers, counted from 0; None: all, with sharing every second.
        stem: "conv" (three convolutions before the patches) or "patch".
        residual_scale: r of x + f(LN(r x)) / r.
        layer_scale: initial value of the LayerScale of the MLPs; 0: without.
        aux_head: a second classifier for every patch token, which token labels train.
        aux_weight: the logits are those of the class token plus this times the maximum over the patch tokens of the
            aux head's; 0: class token only.
        pool: hierarchical pooling of the tokens (`Pool`), or None. The class token passes by.
        drop_path_rate, drop_rate, attn_drop_rate: as in `Hvt`.
        kernels: "torch", or "triton": on a GPU `fused_mlp` and `sum_norm`, and the official flavour is trained by
            `refine_fused`.

    Attributes:
        token_grid: side of the grid of patch tokens; None with pooling.

    Raises:
        ModelError: sizes that don't fit together, or an unknown choice.
    """

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 12,
        mlp_ratio: float = 3.0,
        flavour: Flavour = "official",
        expansion: int = 3,
        kernel: int = 3,
        reduction: bool = True,
        sharing: bool | None = None,
        blocks: Sequence[int] | None = None,
        stem: Stem = "conv",
        residual_scale: float = 0.5,
        layer_scale: float = 1e-5,
        aux_head: bool = True,
        aux_weight: float = 0.5,
        pool: Pool | Mapping[str, Any] | None = None,
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        kernels: Kernels = "torch",
        local: Local = "raster",
    ) -> None:
        check_choice("stem", stem, Stem)
        check_ints(1, in_chans=in_chans, embed_dim=embed_dim, num_heads=num_heads)
        check_bools(aux_head=aux_head)
        for option, value in (("aux_weight", aux_weight), ("layer_scale", layer_scale)):
            if value != 0:
                check_positive(**{option: value})
        token_side(img_size, patch_size)
        sharing = flavour == "official" if sharing is None else sharing
        refine = {"flavour": flavour, "expansion": expansion, "kernel": kernel, "reduction": reduction}
        of_maps = kernels if flavour == "official" and local == "raster" else "torch"
        make_stem = ConvStem if stem == "conv" else PatchStem
        super().__init__(
            img_size,
            in_chans,
            num_classes,
            stem=make_stem(in_chans, embed_dim, patch_size),
            patch_size=patch_size,
            dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_token=True,
            pool=Pool.of(pool),
            pool_pos_embed=True,
            refine=Refine.of(refine | {"sharing": sharing, "blocks": blocks, "kernels": of_maps, "local": local}),
            residual_scale=residual_scale,
            layer_scale=layer_scale or None,
            drop_path_rate=drop_path_rate,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            kernels=kernels,
        )
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.aux_head = nn.Linear(embed_dim, num_classes) if num_classes and aux_head else None
        self.aux_weight = aux_weight
        self._init_weights()

    def in_order(self) -> list[nn.Module | nn.Parameter]:
        """See `ImageModel`."""
        heads = [self.head] if self.aux_head is None else [self.head, self.aux_head]
        return [*super().in_order(), *heads]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class-token logits plus `aux_weight` times the largest patch-token logits: (B, N, C) -> (B, num_classes)."""
        if pre_logits:
            return x[:, 0]
        logits = self.head(x[:, 0])
        if self.aux_head is None or self.aux_weight == 0:
            return logits
        return logits + self.aux_weight * self.aux_head(x[:, 1:]).amax(dim=1)

    def forward(  # type: ignore[override]
        self, images: Tensor, dense: DenseRequest | None = None
    ) -> Tensor | DenseOutput:
        """(B, in_chans, img_size, img_size) -> logits (B, num_classes), or with `dense` what a dense loss needs."""
        if dense is None:
            return super().forward(images)
        plane = self.tokens(images)
        pasted = self._pasted(plane, dense)
        if pasted is not None:
            plane = torch.where(pasted[:, None], plane[dense.partner], plane)
        similarities: list[Tensor] = []
        before: list[Tensor] = []

        def compare(layer: int, maps: Tensor | None) -> None:
            if layer > dense.map_pairs or not dense.map_pairs:
                return
            if maps is None or (before and before[-1].shape != maps.shape):
                raise ModelError(
                    f"layer {layer} has no attention maps that can be compared with those of the layer before; "
                    "compare fewer pairs, refine all layers, or don't compare maps"
                )
            if before:
                similarities.append(cosine(before.pop(), maps))
            before.append(maps)

        x = self.encode(plane, compare)
        tokens = None
        if self.aux_head is not None:
            tokens = self.aux_head(x[:, 1:])
            if pasted is not None:
                tokens = torch.where(pasted.flatten(1)[:, :, None], tokens[dense.partner], tokens)
        if len(similarities) < dense.map_pairs:
            raise ModelError(
                f"{dense.map_pairs} pairs of attention maps can't be compared in {len(self.blocks)} layers"
            )
        return DenseOutput(self.head(x[:, 0]), tokens, sum(similarities[1:], similarities[0]) if similarities else None)

    def fold(self) -> Refiner:
        """A copy for inference with fewer operations and the same logits; see `fold_refiners`."""
        return fold_refiners(self)

    def _pasted(self, plane: Tensor, dense: DenseRequest) -> Tensor | None:
        """(B, s, s) bool: the tokens that come from the partner."""
        if dense.partner is None or dense.box is None:
            return None
        if self.token_grid is None:
            raise ModelError("MixToken needs the tokens on a grid at the end: leave out the pool")
        rows = torch.arange(plane.shape[2], device=plane.device)[None, :, None]
        columns = torch.arange(plane.shape[3], device=plane.device)[None, None, :]
        top, bottom, left, right = dense.box[:, :, None, None].unbind(1)
        return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


_SIZES: dict[str, dict[str, Any]] = {
    "s": {"embed_dim": 384, "depth": 16, "num_heads": 12, "drop_path_rate": 0.1},
    "m": {"embed_dim": 420, "depth": 32, "num_heads": 12, "drop_path_rate": 0.2},
    "l": {"embed_dim": 512, "depth": 32, "num_heads": 16, "drop_path_rate": 0.25},
}
_TOP1 = {"s": 83.6, "m": 84.6, "l": 84.9}
for _flavour, _suffix in (("official", ""), ("linear", "_linear")):
    for _size, _config in _SIZES.items():
        _config = {"img_size": 224, "patch_size": 16, "num_classes": 1000, "flavour": _flavour} | _config
        _reported: dict[str, Any] = {"top1": _TOP1[_size], "dataset": "ImageNet-1k", "source": "official README"}
        if _suffix:
            _reported = {"source": "the paper's form; no figure known"}
        _name = f"refiner_vit_{_size}{_suffix}"
        register(ModelInfo(_name, "refiner", Refiner, _config, "Refiner 2106.03714", **_reported))
