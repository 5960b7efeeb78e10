"""The largest batch that fits on a GPU."""

from __future__ import annotations

from collections.abc import Callable

_FIRST, _LAST = 16, 8192


def largest(fits: Callable[[int], bool]) -> int:
    """The largest of the sizes 2^n and 3 · 2^n up to 8192 that fits, by doubling or halving from 16; 0: none does.

    Args:
        fits: whether a batch of that size does; every smaller one then does as well.
    """
    size = _FIRST
    while size and not fits(size):
        size //= 2
    while size >= _FIRST and size < _LAST and fits(2 * size):
        size *= 2
    half_more = size + size // 2
    return half_more if 1 < size < _LAST and fits(half_more) else size
