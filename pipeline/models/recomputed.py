"""What an operation needs of its input for its backward pass, computed again there in place of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def recomputed(value: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """In this block operations keep no `value` for their backward pass, but take what `again()` gives there.

    The same bits, where `again` computes it as it was computed. Cheaper than `torch.utils.checkpoint`, which runs a
    whole region again, for a value that one cheap operation makes of what is kept anyway.

    Args:
        value: contiguous.
        again: gives it once more, without gradients, from tensors that the caller knows to be kept.
    """
    own = _place(value)

    def pack(kept: Tensor) -> Any:
        return kept.shape if kept.is_contiguous() and _place(kept) == own else kept

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return again().view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """Where its elements are; not the address, which tensors without memory don't have."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel()
