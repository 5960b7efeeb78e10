"""DeiT, the baseline of all three papers: timm's vision transformer behind this package's interface.

Touvron et al., "Training data-efficient image transformers & distillation through attention", 2021, arXiv 2012.12877.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from pipeline.models.base import ImageModel
from pipeline.models.drop_path import DropPath, drop_path_rates
from pipeline.models.errors import ModelError, check_heads, check_ints, check_positive, check_rates
from pipeline.models.layers import hidden_width, normal_, run_layers
from pipeline.models.pos_embed import Mode, resize_grid
from pipeline.models.registry import ModelInfo, register
from pipeline.models.tokens import INIT_STD, token_side


class Deit(ImageModel):
    """timm's VisionTransformer with a class token: (B, in_chans, img_size, img_size) -> logits (B, num_classes).

    Its stochastic depth is replaced by ours, whose noise can be handed over (see `set_drop_path_noise`), and the class
    token is drawn as by timm 0.3.2, with which DeiT was trained: today's timm draws it with 1e-6 in place of 0.02.

    Args:
        img_size, patch_size: sides of the image and of a token in pixels.
        in_chans, num_classes: channels and classes; 0 classes: no head, `forward` returns the class token.
        embed_dim, depth, num_heads, mlp_ratio: width, layers, heads, hidden width of an MLP over the width.
        drop_path_rate: stochastic depth of the last layer; the rates rise linearly from 0 at the first.
        drop_rate, attn_drop_rate: dropout after positions, projections and in the MLP; of attention weights.

    Attributes:
        vit: the timm model; its state dict is that of the official checkpoints.
    """

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
    ) -> None:
        from timm.models.vision_transformer import VisionTransformer

        super().__init__(img_size, in_chans, num_classes)
        token_side(img_size, patch_size)
        check_ints(1, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        check_positive(mlp_ratio=mlp_ratio)
        check_rates(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate)
        self.patch_size = patch_size
        hidden_width(embed_dim, mlp_ratio)
        check_heads(num_heads, embed_dim, "embed_dim")
        self.vit = VisionTransformer(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            pos_drop_rate=drop_rate,
            proj_drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
        )
        normal_(cast(Tensor, self.vit.cls_token), INIT_STD)
        blocks: Any = self.vit.blocks
        for block, rate in zip(blocks, drop_path_rates(drop_path_rate, depth), strict=True):
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
            block.is_encoder_layer = True

    def no_weight_decay(self) -> set[str]:
        """Position embedding and class token; the recipes exempt biases and 1-D parameters by `optim.decay`."""
        return {"vit.pos_embed", "vit.cls_token"}

    def in_order(self) -> list[nn.Module | nn.Parameter]:
        """See `ImageModel`."""
        vit: Any = self.vit
        first = [vit.patch_embed, vit.cls_token, vit.pos_embed, vit.norm_pre]
        return [*first, *vit.blocks, vit.norm, vit.fc_norm, vit.head]

    def fit_pos_embed(self, name: str, state_dict: Mapping[str, Tensor], mode: Mode) -> Tensor | None:
        """The grid of patch tokens is interpolated, the class token's vector stays; see `resize_grid`."""
        return resize_grid(state_dict[name], 1, self.img_size // self.patch_size, mode)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, img_size, img_size) -> normalised tokens (B, 1 + N, C), the class token first."""
        expected = (self.in_chans, self.img_size, self.img_size)
        if images.shape[1:] != expected:
            raise ModelError(f"this DeiT takes images of shape {expected}, got {tuple(images.shape[1:])}")
        x = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))
        blocks: Any = self.vit.blocks
        return self.vit.norm(run_layers(blocks, x, self.grad_checkpointing))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token, then the classifier: (B, N, C) -> (B, num_classes)."""
        return self.vit.forward_head(x, pre_logits=pre_logits)


_SIZES = {"tiny": (192, 3, 72.2), "small": (384, 6, 79.9), "base": (768, 12, 81.8)}
for _name, (_dim, _heads, _top1) in _SIZES.items():
    _config: dict[str, Any] = {
        "img_size": 224,
        "patch_size": 16,
        "num_classes": 1000,
        "embed_dim": _dim,
        "num_heads": _heads,
    }
    _config |= {"depth": 12, "drop_path_rate": 0.1}
    _reported: dict[str, Any] = {"top1": _top1, "dataset": "ImageNet-1k", "source": "official README"}
    register(ModelInfo(f"deit_{_name}", "deit", Deit, _config, "DeiT 2012.12877", **_reported))
