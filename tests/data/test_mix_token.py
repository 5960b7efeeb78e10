"""MixToken's draws: their rule, their golden values, and that no process changes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.data.augment.mix_token import draw_mix_token
from pipeline.errors import UserError

GOLDEN_BOXES = [[0, 7, 0, 6], [4, 14, 1, 13], [0, 7, 6, 14]]


def test_mix_token_by_its_definition() -> None:
    mix = draw_mix_token(seed=1, step=7, lanes=[4, 0, 9], chunk=5, grid=14)
    assert mix.partner.tolist() == [4, 3, 2, 1, 0, 9, 8, 7, 6, 5, 14, 13, 12, 11, 10]
    assert torch.equal(mix.partner[mix.partner], torch.arange(15))
    for chunk in range(3):
        boxes = mix.box[5 * chunk : 5 * chunk + 5]
        assert (boxes == boxes[0]).all()
        top, bottom, left, right = boxes[0].tolist()
        assert 0 <= top <= bottom <= 14 and 0 <= left <= right <= 14
        assert mix.own[5 * chunk].item() == pytest.approx(1 - (bottom - top) * (right - left) / 196)
    # The draws are part of what a seed promises.
    assert mix.box[::5].tolist() == GOLDEN_BOXES


def test_mix_token_s_boxes_are_those_of_the_official_rule() -> None:
    """lam uniform, side int(14 sqrt(1 - lam)), half of it on each side of a uniform centre: by enumeration."""
    lams = (np.arange(2000) + 0.5) / 2000
    halves = (14 * np.sqrt(1 - lams)).astype(int) // 2
    lengths = np.array([[min(c + h, 14) - max(c - h, 0) for c in range(14)] for h in range(8)])
    expected = np.mean([1 - lengths[h].mean() ** 2 / 196 for h in halves])
    drawn = draw_mix_token(seed=0, step=0, lanes=range(4000), chunk=2, grid=14).own[::2]
    assert drawn.mean().item() == pytest.approx(expected, abs=4 * drawn.std().item() / math.sqrt(4000))
    assert drawn.unique().numel() > 30


def test_mix_token_does_not_depend_on_the_process() -> None:
    whole = draw_mix_token(0, 3, range(8), 4, 14)
    for rank in range(4):
        part = draw_mix_token(0, 3, range(rank, 8, 4), 4, 14)
        for i, lane in enumerate(range(rank, 8, 4)):
            ours, theirs = slice(4 * i, 4 * i + 4), slice(4 * lane, 4 * lane + 4)
            for a, b in zip(part.rows(ours), whole.rows(theirs), strict=True):
                assert torch.equal(a, b)
    assert not torch.equal(whole.box, draw_mix_token(0, 4, range(8), 4, 14).box)


def test_mix_token_needs_two() -> None:
    with pytest.raises(UserError, match=r"a chunk of 1 sample has none: set a smaller data.lanes"):
        draw_mix_token(0, 0, [0], 1, 14)
