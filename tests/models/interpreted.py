"""bfloat16 for Triton's interpreter, which computes by NumPy: there it is but 16 bits that stand for nothing.

Values are widened to float32 for products, which changes none of them, and rounded to the nearest bfloat16 where a
kernel rounds to it, as a GPU does. Any other arithmetic in bfloat16 is an error: kernels here have none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def add_bfloat16() -> None:
    """Change this process's interpreter (`TRITON_INTERPRET=1` when Triton was imported)."""
    cast, dot, binary = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.binary_op

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == to.scalar:
            return source
        if to.scalar == tl.bfloat16:
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        wide = _widened(source)
        return wide if wide.dtype.scalar == to.scalar else cast(self, wide, to)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def binary_op(self: Any, a: Any, b: Any, operation: Any) -> Any:
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            raise TypeError(f"{operation.__name__} of bfloat16, which this interpreter can't")
        return binary(self, a, b, operation)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op = binary_op
    for name in ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_fp_to_si"):
        setattr(InterpreterBuilder, name, cast_impl)
    InterpreterBuilder.create_fp_to_fp = lambda self, source, to, rounding: cast_impl(self, source, to)


def _widened(handle: Any) -> Any:
    """As float32, if it is bfloat16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, even ones where two are as near; by PyTorch, which rounds like that too."""
    nearest = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
    return nearest.view(torch.int16).numpy().view(np.uint16)
