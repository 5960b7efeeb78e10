"""HVT, the vision transformer with hierarchical pooling, as in the authors' code.

Pan et al., "Scalable Vision Transformers with Hierarchical Pooling", ICCV 2021, arXiv 2103.10619. Official code:
`models.py` of ziplab/HVT. A DeiT without class token whose sequence is max-pooled after the first layer of each stage;
the classifier sees the mean of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from pipeline.models.errors import check_bools, check_choice, check_ints
from pipeline.models.kernels import Kernels
from pipeline.models.pool import Pool, PoolKind
from pipeline.models.refine import Refine
from pipeline.models.registry import ModelInfo, register
from pipeline.models.stems import PatchStem
from pipeline.models.tokens import TokenTransformer, token_side

Head = Literal["mean", "cls"]


class Hvt(TokenTransformer):
    """HVT for square images: (B, in_chans, img_size, img_size) -> logits (B, num_classes).

    Args:
        img_size, patch_size: sides of the image and of a token in pixels.
        in_chans, num_classes: channels and classes; 0 classes: no head, `forward` returns the pooled features.
        num_heads, head_dim: the width is their product.
        depth: encoder layers.
        mlp_ratio: hidden width of an MLP over the width.
        stages: stages of equal depth; the first layer of each is followed by a pool. 0: no pooling (HVT-*-0).
        pool_after: instead of `stages`, the layers followed by a pool, counted from 0.
        pool_kind: "max", "avg" or "conv".
        pool_kernel, pool_stride: window and step in tokens; with two dimensions the step may be (rows, columns).
        pool_dims: 1, along the raster order as in the official code, or 2, on the image plane.
        pool_pos_embed: a new position embedding after each pool.
        head: "mean" of the tokens, or "cls": a class token, which passes by the pools.
        refine: refine the attention maps of some layers (`Refine`), or None.
        drop_path_rate: stochastic depth of the last layer; the rates rise linearly from 0 at the first.
        drop_rate, attn_drop_rate: dropout after positions, projections and in the MLP; of attention weights.
        kernels: "torch", or "triton": `fused_mlp`, `sum_norm` and `short_attention` on a GPU.

    Raises:
        ModelError: sizes that don't fit together, or an unknown choice.
    """

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 16,
        num_heads: int = 3,
        head_dim: int = 64,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        stages: int = 1,
        pool_after: Sequence[int] | None = None,
        pool_kind: PoolKind = "max",
        pool_kernel: int = 3,
        pool_stride: int | Sequence[int] = 2,
        pool_dims: Literal[1, 2] = 1,
        pool_pos_embed: bool = True,
        head: Head = "mean",
        refine: Refine | Mapping[str, Any] | None = None,
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        kernels: Kernels = "torch",
    ) -> None:
        check_choice("head", head, Head)
        check_ints(1, in_chans=in_chans, num_heads=num_heads, head_dim=head_dim)
        check_bools(pool_pos_embed=pool_pos_embed)
        token_side(img_size, patch_size)
        pool = {"stages": stages, "after": pool_after, "kind": pool_kind, "kernel": pool_kernel}
        dim = num_heads * head_dim
        super().__init__(
            img_size,
            in_chans,
            num_classes,
            stem=PatchStem(in_chans, dim, patch_size),
            patch_size=patch_size,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_token=head == "cls",
            pool=Pool.of(pool | {"stride": pool_stride, "dims": pool_dims}),
            pool_pos_embed=pool_pos_embed,
            refine=Refine.of(refine),
            residual_scale=1.0,
            layer_scale=None,
            drop_path_rate=drop_path_rate,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            kernels=kernels,
        )
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()

    def in_order(self) -> list[nn.Module | nn.Parameter]:
        """See `ImageModel`."""
        return [*super().in_order(), self.head]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the tokens or the class token, then the classifier: (B, N, C) -> (B, num_classes)."""
        x = x.mean(dim=1) if self.cls_token is None else x[:, 0]
        return x if pre_logits else self.head(x)


_HEADS = {"ti": 3, "s": 6, "b": 12}
_TOP1 = {"ti_1": 69.64, "s_0": 80.39, "s_1": 78.00, "s_2": 77.36, "s_3": 76.32, "s_4": 75.23}
for _size, _heads in _HEADS.items():
    for _stages in range(5):
        _config: dict[str, Any] = {
            "img_size": 224,
            "patch_size": 16,
            "num_classes": 1000,
            "num_heads": _heads,
            "depth": 12,
        }
        _config |= {"stages": _stages, "drop_path_rate": 0.1}
        _top1 = _TOP1.get(f"{_size}_{_stages}")
        _reported: dict[str, Any] = {"source": "official README", "top1": _top1, "dataset": "ImageNet-1k"}
        register(
            ModelInfo(f"hvt_{_size}_{_stages}", "hvt", Hvt, _config, "HVT 2103.10619", **(_reported if _top1 else {}))
        )
