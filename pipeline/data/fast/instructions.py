"""Instructions on several values at once, for loops in which the compiler does not find them by itself.

It may not keep a value of one array in a register over a write to another one, because for all that it knows the two
are the same memory. Places are not checked.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba.extending import intrinsic

_BYTE, _WORD, _INDEX = ir.IntType(8), ir.IntType(64), ir.IntType(32)


def _address(context: Any, builder: Any, kind: Any, array: Any, at: Any, read_as: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), read_as.as_pointer())


@intrinsic
def copy_eight(typing: Any, source: Any, i: Any, out: Any, k: Any) -> Any:
    """`out[k + n] = source[i + n]` for n from 0 to 7, of bytes. Returns the eight as uint64, in the machine's order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, i, out, k = arguments
        word = builder.load(_address(context, builder, signature.args[0], source, i, _WORD), align=1)
        builder.store(word, _address(context, builder, signature.args[2], out, k, _WORD), align=1)
        return word

    return numba.types.uint64(source, i, out, k), generate


@intrinsic
def blend_four(typing: Any, line: Any, i: Any, j: Any, weight: Any, out: Any, k: Any) -> Any:
    """`out[k + n] = uint8(a + weight * (b - a))`, cut, with `a = line[i + n]` and `b = line[j + n]`, n from 0 to 3.

    Of float32, to bytes.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, i, j, weight, out, k = arguments
        floats, integers, bytes_ = (ir.VectorType(of, 4) for of in (ir.FloatType(), _INDEX, _BYTE))
        a, b = (builder.load(_address(context, builder, signature.args[0], line, at, floats), align=4) for at in (i, j))
        nothing = ir.Constant(floats, ir.Undefined)
        first = builder.insert_element(nothing, weight, ir.Constant(_INDEX, 0))
        weights = builder.shuffle_vector(first, nothing, ir.Constant(integers, [0] * 4))
        values = builder.fadd(a, builder.fmul(weights, builder.fsub(b, a)))
        cut = builder.trunc(builder.fptosi(values, integers), bytes_)
        builder.store(cut, _address(context, builder, signature.args[4], out, k, bytes_), align=1)
        return context.get_dummy_value()

    return numba.types.void(line, i, j, weight, out, k), generate
