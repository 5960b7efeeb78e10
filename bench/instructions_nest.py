"""Machine instructions of NesT's kernels, without a GPU: what attention, MLPs and residual sums cost outside of memory.

    python -m bench.instructions_nest [--capability 90] [--out bench/results/instructions_nest.json]

As `instructions.py` counts Refiner's: for the forward and the backward pass of one image, how long they take at least
if every processor issued four in each cycle. Residual sums are shared out as in a batch of 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench.instructions import CYCLES, PROCESSORS, compiled_with, lengths, report
from pipeline.models import create_model, mlp_kernel, short_kernel, sum_norm_kernel
from pipeline.models.layers import EncoderLayer
from pipeline.models.nest import Nest

MODELS = ["nest_tiny", "nest_small", "nest_base"]
HALF, BATCH = torch.bfloat16, 128
# Arguments in bf16: of MLPs and attention, and of residual sums, whose `x` and `weight` are in float32.
PRODUCTS = {"x", "weight", "before", "after", "grad", "grad_before", "qkv", "grad_qkv", "out"}
SUMS = {"branch", "normed", "grad_normed", "grad_branch"}


class Use(NamedTuple):
    """A kernel of a layer: how often its loop runs, and the programs that an image has."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, Any]
    steps: int
    programs: float
    half: set[str] = PRODUCTS


def uses(tokens: int, blocks: int, layer: Any, capability: int) -> Iterator[Use]:
    """Of one layer for `blocks` blocks of so many tokens."""
    hidden, dim = layer.mlp.fc1.weight.shape
    heads = layer.attn.num_heads
    shape = {"DIM": dim, "HIDDEN": hidden, "TANH": True} | mlp_kernel.settings(dim, HALF)
    tiles = blocks * tokens * triton.cdiv(hidden, shape["BN"]) / shape["BM"]
    steps, how = triton.cdiv(dim, shape["BK"]), mlp_kernel.options(HALF)
    yield Use("MLP, forward", mlp_kernel.forward_kernel, shape | {"KEEP": True}, how, steps, tiles)
    yield Use("MLP, backward", mlp_kernel.backward_kernel, shape | {"AGAIN": False}, how, steps, tiles)
    shape = short_kernel.settings(tokens, dim // heads, heads, heads, HALF)
    for name, kernel in (("forward", short_kernel.forward_kernel), ("backward", short_kernel.backward_kernel)):
        queries, how = short_kernel.options(kernel, tokens, dim // heads, capability == 90)
        steps = triton.cdiv(tokens, queries)
        yield Use(f"attention, {name}", kernel, shape | {"BQ": queries}, how, steps, blocks * heads)
    yield from uses_of_sums(blocks * tokens, dim)


def uses_of_sums(rows: int, dim: int) -> Iterator[Use]:
    """Of one layer: the first LayerNorm, the sum with the second, the last sum."""
    shape = {"EPS": 1e-6, "TIMES": 1.0} | sum_norm_kernel.settings(dim, torch.float32)
    tiles, programs = sum_norm_kernel.share(BATCH * rows, shape["BM"])
    how = sum_norm_kernel.OPTIONS
    for adds, norms in ((False, True), (True, True), (True, False)):
        given = shape | {"ADDS": adds, "BIASED": adds, "SCALED": adds, "NORMS": norms}
        yield Use("sums, forward", sum_norm_kernel.forward_kernel, given, how, 1, rows / shape["BM"], SUMS)
        yield Use("sums, backward", sum_norm_kernel.backward_kernel, given, how, tiles, programs / BATCH, SUMS)


def count(name: str, capability: int) -> dict[str, Any]:
    """Millions of instructions an image by kernel, and the microseconds of all."""
    with torch.device("meta"):
        model = create_model(name)
    assert isinstance(model, Nest)
    found: dict[str, float] = {}
    for level in model.levels:
        tokens, blocks = level.pos_embed.shape[2], level.pos_embed.shape[1]
        layers = [layer for layer in level.layers if isinstance(layer, EncoderLayer)]
        for use in uses(tokens, blocks, layers[0], capability):
            everything, loops = lengths(compiled_with(use.kernel, use.constants, use.options, capability, use.half))
            # A loop of one step is none.
            inner = loops[0] if loops else 0
            each = (everything + (use.steps - 1) * inner) * use.options["num_warps"]
            found[use.name] = found.get(use.name, 0.0) + len(layers) * each * use.programs / 1e6
    return {
        "model": name,
        "millions": {kernel: round(millions, 2) for kernel, millions in found.items()},
        "microseconds_an_image": round(sum(found.values()) / (4 * PROCESSORS * CYCLES) * 1e12, 1),
    }


if __name__ == "__main__":
    report(Path(__file__), "NesT", MODELS, count)
