"""What a BERT encoder is made of; known without the library that builds it.

Sizes: Devlin et al. 2018 (base, large), arXiv 1810.04805; Turc et al. 2019 (the small ones), arXiv 1908.08962.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from pipeline.models.errors import ModelError, UnknownOption, check_choice, check_heads, check_ints, check_rates
from pipeline.models.refine import Refine

PAPER = "Devlin et al., BERT, 2018 (arXiv 1810.04805)"
REFINER_PAPER = "Zhou et al., Refiner, 2021 (arXiv 2106.03714), in BERT"

# layers, channels, heads
SIZES = {
    "bert_tiny": (2, 128, 2),
    "bert_mini": (4, 256, 4),
    "bert_small": (4, 512, 8),
    "bert_medium": (8, 512, 8),
    "bert_base": (12, 768, 12),
    "bert_large": (24, 1024, 16),
}
Start = Literal["identity", "random"]


@dataclass(frozen=True)
class BertOptions:
    """An encoder and its head.

    Attributes:
        layers, dim, heads: of the encoder; the MLPs have 4 x dim hidden channels.
        vocab_size: tokens that have an embedding.
        positions: most tokens of a sequence.
        num_classes: outputs.
        dropout, attn_dropout: after embeddings, projections, MLPs and before the head; of attention maps.
        refine: which layers refine their attention maps, and how; None: none. Layers don't share maps.
        refine_start: `identity` lets a linear refiner start as the identity, so that pretrained weights go on as they
            were; `random`: as the image models start. The official flavour always starts at random.
    """

    layers: int
    dim: int
    heads: int
    vocab_size: int = 30522
    positions: int = 512
    num_classes: int = 2
    dropout: float = 0.1
    attn_dropout: float = 0.1
    refine: Refine | None = None
    refine_start: Start = "identity"

    def __post_init__(self) -> None:
        names = ("layers", "dim", "heads", "vocab_size", "positions", "num_classes")
        check_ints(1, **{name: getattr(self, name) for name in names})
        check_rates(dropout=self.dropout, attn_dropout=self.attn_dropout)
        check_heads(self.heads, self.dim, "dim")
        check_choice("refine_start", self.refine_start, Start)
        if self.refine is None:
            return
        if self.refine.sharing:
            raise ModelError("refine.sharing=true is for image models: every layer of BERT has queries and keys")
        if self.refine.local != "raster":
            raise ModelError(f"refine.local={self.refine.local} is for image models: sentences lie on no plane")
        if self.refine.kernels != "torch":
            raise ModelError(f"refine.kernels={self.refine.kernels} is for image models: its maps have no padding")
        maps = self.heads * self.refine.expansion
        if not self.refine.reduction and (self.refine_start == "identity" or self.dim % maps):
            raise ModelError(
                f"refine.reduction=false needs refine_start=random and {maps} expanded maps that divide dim={self.dim}"
            )
        unknown = sorted(set(self.refine.blocks or ()) - set(range(self.layers)))
        if unknown:
            raise ModelError(f"refine.blocks names layer {unknown[0]}; the model has layers 0 to {self.layers - 1}")

    @property
    def refined(self) -> set[int]:
        """The refined layers."""
        if self.refine is None:
            return set()
        return set(range(self.layers) if self.refine.blocks is None else self.refine.blocks)

    @classmethod
    def of(cls, name: str, overrides: Mapping[str, Any]) -> Self:
        """The options of a named size, changed by those of a recipe; None leaves the size's own.

        Raises:
            ModelError: no such size, an unknown option, or one that can't be used.
        """
        if name not in SIZES:
            near = difflib.get_close_matches(name, SIZES, n=3)
            hint = f", did you mean {' or '.join(near)}?" if near else ""
            raise ModelError(f"unknown model {name!r}{hint}; for text there are {', '.join(SIZES)}")
        known = [field.name for field in fields(cls)]
        given = {key: value for key, value in overrides.items() if value is not None}
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                raise UnknownOption(f"model {name!r} has no option {key!r}{hint}; its options are: {', '.join(known)}")
        if "refine" in given:
            given["refine"] = Refine.of(given["refine"])
        return cls(**(dict(zip(("layers", "dim", "heads"), SIZES[name], strict=True)) | given))
