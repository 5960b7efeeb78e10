"""The block layout of NesT: an image plane cut into square blocks whose tokens attend to each other only."""

from __future__ import annotations

from math import isqrt

from torch import Tensor


def blockify(x: Tensor, block_size: int) -> Tensor:
    """Cut an image plane into blocks: (B, H, W, C) -> (B, T, n, C) with n = block_size² and T = H·W / n.

    Blocks are in raster order, and so are the tokens inside a block. block_size must divide H and W.
    """
    b, h, w, c = x.shape
    p = block_size
    return x.reshape(b, h // p, p, w // p, p, c).transpose(2, 3).reshape(b, -1, p * p, c)


def unblockify(x: Tensor) -> Tensor:
    """Put square blocks back on a square image plane: (B, T, n, C) -> (B, √(T·n), √(T·n), C); inverse of `blockify`."""
    b, t, n, c = x.shape
    g, p = isqrt(t), isqrt(n)
    return x.reshape(b, g, g, p, p, c).transpose(2, 3).reshape(b, g * p, g * p, c)
