"""Which layers of a model refine their attention maps (`refine_maps`), and how: options, and the layers' attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

from torch import nn

from pipeline.models.attention import Attention, MapAttention
from pipeline.models.errors import ModelError, check_bools, check_choice, check_ints, check_keys
from pipeline.models.kernels import Kernels
from pipeline.models.refine_fused import check_refine_fused
from pipeline.models.refine_local import Local
from pipeline.models.refine_maps import LinearRefiner, OfficialRefiner

Flavour = Literal["official", "linear"]


@dataclass(frozen=True)
class Refine:
    """Which layers refine their attention maps, and how: the `refine` option of every architecture.

    Attributes:
        flavour: "linear", the paper's form; "official", the released one with BatchNorm, ReLU6 and a shortcut.
        expansion: maps after the expansion, per head.
        kernel: side of the local kernels, odd.
        local: their neighbours: "raster", those in the order of the tokens, on both axes; the others take the places of
            queries on the image plane, see `PlaneLocal`.
        reduction: mix back to one map per head; without it the values are split into as many heads as there are maps.
        sharing: refined layers have no queries and keys and take the maps of the layer before.
        blocks: the refined layers, counted from 0 over the whole model; None: all, or with sharing every second layer
            of each run of layers with equal sequence lengths.
        kernels: "torch", or "triton": `refine_fused` trains the official flavour on a GPU.
    """

    flavour: Flavour = "linear"
    expansion: int = 3
    kernel: int = 3
    reduction: bool = True
    sharing: bool = False
    blocks: tuple[int, ...] | None = None
    kernels: Kernels = "torch"
    local: Local = "raster"

    def __post_init__(self) -> None:
        check_choice("refine.flavour", self.flavour, Flavour)
        check_choice("refine.local", self.local, Local)
        check_choice("kernels", self.kernels, Kernels)
        check_ints(1, **{"refine.expansion": self.expansion, "refine.kernel": self.kernel})
        check_bools(**{"refine.reduction": self.reduction, "refine.sharing": self.sharing})
        if self.kernel % 2 == 0:
            raise ModelError(f"refine.kernel={self.kernel} has no middle: choose an odd one (1, 3, 5)")
        if self.flavour == "official" and not self.reduction:
            raise ModelError("refine.reduction=false needs refine.flavour=linear: the shortcut of the official one")
        if self.kernels == "triton" and self.local != "raster":
            raise ModelError(f"kernels=triton is for refine.local=raster, not {self.local}: leave one of them out")
        if self.kernels == "triton" and self.flavour != "official":
            raise ModelError(
                f"kernels=triton refines by flavour=official, not {self.flavour}: take that flavour, or leave it out"
            )

    @classmethod
    def of(cls, options: Self | Mapping[str, Any] | None) -> Self | None:
        """The settings that a recipe gives as a mapping.

        Raises:
            ModelError: an unknown key or a value that can't be used.
        """
        if options is None or isinstance(options, cls):
            return options
        given = check_keys("refine", options, cls, "{expansion: 3, kernel: 3}")
        blocks = given.get("blocks")
        if blocks is not None and not (isinstance(blocks, Sequence) and all(type(b) is int for b in blocks)):
            raise ModelError(f"refine.blocks={blocks!r}: give a list of layer numbers, or null for the default")
        return cls(**{**given, "blocks": None if blocks is None else tuple(blocks)})

    def make(self, num_heads: int, head_dim: int) -> nn.Module:
        """A refiner for the maps of one layer."""
        if self.flavour == "linear":
            return LinearRefiner(num_heads, self.expansion, self.kernel, self.reduction, self.local)
        scale = head_dim**-0.5 if self.sharing else 1.0
        refiner = OfficialRefiner(num_heads, self.expansion, self.kernel, scale, self.local)
        if self.kernels == "triton":
            check_refine_fused(num_heads, self.kernel)
            refiner.fused = True
        return refiner


class MapUse(NamedTuple):
    """What one encoder layer does with attention maps. All False: the fused attention without explicit maps.

    Attributes:
        explicit: compute or take explicit maps.
        refined: refine them.
        shared: take those of the layer before.
        accumulate: add those of the layer before.
    """

    explicit: bool = False
    refined: bool = False
    shared: bool = False
    accumulate: bool = False


def map_uses(refine: Refine | None, runs: Sequence[int]) -> list[MapUse]:
    """What each layer of a model does with maps.

    Args:
        refine: the option, or None for none.
        runs: numbers of consecutive layers with equal sequence lengths; maps don't go from one run to the next.

    Raises:
        ModelError: `blocks` names a layer that doesn't exist, or one that has nothing to share.
    """
    depth = sum(runs)
    if refine is None:
        return [MapUse()] * depth
    firsts = [sum(runs[:i]) for i in range(len(runs)) if runs[i]]
    refined = _refined_layers(refine, runs, firsts, depth)
    official = refine.flavour == "official"
    uses = []
    for i in range(depth):
        shared = refine.sharing and i in refined
        hands_on = refine.sharing and i + 1 in refined
        explicit = official or i in refined or hands_on
        uses.append(MapUse(explicit, i in refined, shared, official and not shared))
    return uses


def _refined_layers(refine: Refine, runs: Sequence[int], firsts: Sequence[int], depth: int) -> set[int]:
    if refine.blocks is None and not refine.sharing:
        return set(range(depth))
    if refine.blocks is None:
        second = {s + j for s, n in zip(firsts, (n for n in runs if n), strict=True) for j in range(1, n, 2)}
        if not second:
            raise ModelError("refine.sharing=true needs two layers of equal sequence length; set it to false")
        return second
    refined = set(refine.blocks)
    unknown = sorted(refined - set(range(depth)))
    if unknown:
        raise ModelError(f"refine.blocks names layer {unknown[0]}; the model has layers 0 to {depth - 1}")
    alone = sorted(refined & set(firsts))
    if refine.sharing and alone:
        raise ModelError(
            f"refine.blocks: layer {alone[0]} is the first with its sequence length and can't share the maps of the "
            "layer before; leave it out or set refine.sharing=false"
        )
    return refined


def make_attention(
    use: MapUse,
    refine: Refine | None,
    dim: int,
    num_heads: int,
    *,
    multi_query: bool = False,
    kernels: Kernels = "torch",
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> nn.Module:
    """The attention of one layer: fused where no explicit maps are needed."""
    if not use.explicit:
        dropout = {"attn_drop": attn_drop, "proj_drop": proj_drop}
        return Attention(dim, num_heads, multi_query=multi_query, kernels=kernels, **dropout)
    refiner = refine.make(num_heads, dim // num_heads) if refine is not None and use.refined else None
    attention = MapAttention(
        dim,
        num_heads,
        refiner,
        shared=use.shared,
        accumulate=use.accumulate,
        multi_query=multi_query,
        attn_drop=attn_drop,
        proj_drop=proj_drop,
    )
    attention.lean = refine is not None and refine.kernels == "triton"
    return attention
