"""What a model can give a loss beyond class logits: logits of every token, and how alike its attention maps are."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DenseRequest(NamedTuple):
    """What to compute beside the class logits; given to `forward` as `dense`.

    Attributes:
        partner: (B,) int64, the sample whose tokens are pasted into each sample (MixToken), an involution: the partner
            of the partner is the sample itself. None: nothing is pasted.
        box: (B, 4) int64, top, bottom, left, right of the pasted box on the token grid, bottom and right excluded; the
            same for partners. None: nothing is pasted.
        map_pairs: how many pairs of consecutive attention maps, from the first block, are compared; 0: none.
    """

    partner: Tensor | None = None
    box: Tensor | None = None
    map_pairs: int = 0


class DenseOutput(NamedTuple):
    """The answer to a `DenseRequest`.

    Attributes:
        logits: (B, K) of the class token.
        tokens: (B, N, K) of every patch token in raster order, MixToken undone; None for a model without an aux head.
        similarity: 0-D, the sum over the compared pairs of the cosine between the two maps over the heads, averaged
            over images, queries and keys; None when no pairs were asked for.
    """

    logits: Tensor
    tokens: Tensor | None
    similarity: Tensor | None
