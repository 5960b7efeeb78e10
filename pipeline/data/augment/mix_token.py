"""MixToken: a box of patch tokens pasted from the partner, drawn for a whole lane chunk.

Jiang et al., "All Tokens Matter", 2021, section 3.3; official code: `Refiner_ViT.forward_features` of
zhoudaquan/Refiner_ViT. The model pastes, and puts its token logits back; here is only drawn what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, Self

import numpy as np
import torch

from pipeline.data.augment.keyed import Stream, check_partners, chunk_key, uniforms


class MixTokenParams(NamedTuple):
    """What is pasted into each of B samples.

    Attributes:
        partner: (B,) int64, where the tokens come from: the chunk in reverse order, so its own inverse.
        box: (B, 4) int64, top, bottom, left, right on the token grid, bottom and right excluded; one for a chunk.
        own: (B,) float32, part of the tokens that stay the sample's own.
    """

    partner: torch.Tensor
    box: torch.Tensor
    own: torch.Tensor

    def rows(self, part: slice) -> Self:
        """Those samples alone, which must be whole chunks."""
        return type(self)(self.partner[part] - part.start, self.box[part], self.own[part])


def draw_mix_token(seed: int, step: int, lanes: Iterable[int], chunk: int, grid: int) -> MixTokenParams:
    """What is pasted into the samples of one process in a global step.

    Args:
        seed: seed of the run.
        step: global step.
        lanes: lanes of this process, in the order of their chunks in the batch.
        chunk: samples that a step takes of each lane.
        grid: tokens on a side.

    Raises:
        UserError: a chunk has one sample, which has no partner.
    """
    check_partners(chunk, "MixToken takes", "objective.mix_token=false")
    boxes = np.array([_draw_box(chunk_key(seed, step, int(lane)), grid) for lane in lanes]).reshape(-1, 4)
    own = 1 - (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / grid**2
    first = np.arange(len(boxes))[:, None] * chunk
    return MixTokenParams(
        partner=torch.from_numpy((first + np.arange(chunk)[::-1]).reshape(-1)),
        box=torch.from_numpy(np.repeat(boxes, chunk, axis=0)),
        own=torch.from_numpy(np.repeat(own, chunk).astype(np.float32)),
    )


def _draw_box(key: int, grid: int) -> tuple[int, int, int, int]:
    """A box of about (1 - lam) of the grid, lam uniform, centred anywhere and cut at the edge."""
    # Beta(1, 1), which the recipe names, is the uniform distribution.
    lam, u_y, u_x = uniforms(key, Stream.MIX_TOKEN, 3).tolist()
    half = int(grid * math.sqrt(1 - lam)) // 2  # an odd side loses a token, as in the official code
    y, x = int(u_y * grid), int(u_x * grid)
    return max(y - half, 0), min(y + half, grid), max(x - half, 0), min(x + half, grid)
