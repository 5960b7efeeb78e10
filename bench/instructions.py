"""Machine instructions of Refiner's kernels, without a GPU: what a refined layer costs outside of memory.

    python -m bench.instructions [--capability 90] [--out bench/results/instructions.json]

Triton compiles the kernels, NVIDIA's disassembler shows them. Each has loops, of which it is known how often they run
for maps of 197 x 197; all else in it runs once for each program. Counted are instructions of a warp (32 threads), also
those that a predicate turns off. How long they take at least: as if every processor issued four in each cycle.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.models import refine_calls
from pipeline.models import refine_kernel as ahead
from pipeline.models import refine_kernel_backward as behind
from pipeline.tracking.environment import key_versions

# Heads, expanded maps, refined layers; and processors and cycles a second of an H100 or H200.
MODELS = {"refiner_vit_s": (12, 36, 8), "refiner_vit_m": (12, 36, 16), "refiner_vit_l": (16, 48, 16)}
PROCESSORS, CYCLES, PIXELS = 132, 1.75e9, 197
HALF = {"maps", "convolved", "reduced", "out", "grad", "grad_second", "grad_maps", "weights", "mixed"}
INTEGERS = {"samples", "rows", "columns", "run", "plane", "parts", "count", "size", "tiles"}


class Use(NamedTuple):
    """A kernel as a step launches it, once for each refined layer."""

    name: str
    kernel: Any
    constants: dict[str, Any]


USES = [
    Use("covariance", ahead.covariance_kernel, {}),
    Use("convolve, forward", ahead.convolve_kernel, {"STORE": True, "SUM": True}),
    Use("reduce", ahead.reduce_kernel, {}),
    Use("combine", ahead.combine_kernel, {}),
    Use("head_sums", behind.head_sums_kernel, {}),
    Use("convolve, backward", ahead.convolve_kernel, {"STORE": True, "SUM": False}),
    Use("behind_second", behind.behind_second_kernel, {"STORE": True}),
    Use("deconvolve", behind.deconvolve_kernel, {}),
    Use("finish", behind.finish_kernel, {}),
]


def compiled(kernel: Any, size: refine_calls.Size, given: dict[str, Any], capability: int) -> Any:
    """What Triton makes of a kernel for maps in bf16."""
    return compiled_with(kernel, size.constants(kernel) | given, size.options(kernel), capability)


def compiled_with(
    kernel: Any, constants: dict[str, Any], options: dict[str, Any], capability: int, half: Collection[str] = HALF
) -> Any:
    """The same of any kernel whose arguments are known by their names: `half` in bf16, others float32 or integers."""
    types = {name: "*bf16" if name in half else "i32" if name in INTEGERS else "*fp32" for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def lengths(made: Any) -> tuple[int, list[int]]:
    """Instructions of a kernel, and of its loops, the shortest first; a loop's own include those within it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    places = [int(place, 16) for place, _ in lines]
    # Behind its last instruction a kernel jumps to itself.
    jumps = [(int(place, 16), re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)) for place, line in lines]
    back = [(int(to[1], 16), place) for place, to in jumps if to and int(to[1], 16) < place]
    return len(lines), sorted(sum(first <= place <= last for place in places) for first, last in back)


def of_a_layer(use: Use, size: refine_calls.Size, capability: int) -> tuple[float, int]:
    """Instructions for the maps of one image in one layer, and of the innermost loop."""
    made = compiled(use.kernel, size, use.constants, capability)
    everything, loops = lengths(made)
    constants, plane = size.constants(use.kernel), PIXELS**2
    if use.kernel is ahead.combine_kernel:
        each, programs = float(everything), size.heads * plane / constants["SIZE"]
    elif use.kernel in (ahead.convolve_kernel, behind.deconvolve_kernel):
        runs, halo = triton.cdiv(PIXELS, refine_calls.ROWS), size.kernel - 1
        steps = triton.cdiv(PIXELS, runs) + halo
        chunks = triton.cdiv(size.hidden, constants["CH"])
        if use.kernel is ahead.convolve_kernel:
            each = steps * loops[0] + everything - loops[0]
            programs = triton.cdiv(PIXELS, constants["WIDTH"] - halo) * runs / constants["LINES"] * chunks
        else:  # chunks are a loop around the rows
            each = chunks * (steps * loops[0] + loops[-1] - loops[0]) + everything - loops[-1]
            programs = PIXELS / (constants["P"] - halo) * runs
    else:
        pixels = constants["TILES"] * constants["SIZE" if "SIZE" in constants else "P"]
        each, programs = constants["TILES"] * loops[-1] + everything - loops[-1], triton.cdiv(plane, pixels)
        if use.kernel is behind.head_sums_kernel:
            programs *= size.heads
        elif use.kernel is behind.behind_second_kernel:
            programs *= triton.cdiv(size.hidden, constants["CH"])
    return each * programs * size.options(use.kernel)["num_warps"], (loops or [everything])[0]


def count(name: str, capability: int) -> dict[str, Any]:
    """Millions of instructions a layer and image by kernel, their sum, and microseconds an image for all layers."""
    heads, hidden, layers = MODELS[name]
    size = refine_calls.Size(heads, hidden, 3, torch.bfloat16, 1e-5, 1.0)
    kernels = {use.name: of_a_layer(use, size, capability) for use in USES}
    total = sum(millions for millions, _ in kernels.values())
    return {
        "model": name,
        "millions": {kernel: round(found / 1e6, 2) for kernel, (found, _) in kernels.items()},
        "innermost_loop": {kernel: loop for kernel, (_, loop) in kernels.items()},
        "millions_a_layer": round(total / 1e6, 1),
        "microseconds_an_image": round(total * layers / (4 * PROCESSORS * CYCLES) * 1e6),
    }


def main() -> None:
    report(Path(__file__), "Refiner", MODELS, count)


def report(script: Path, of: str, names: Iterable[str], count: Callable[[str, int], dict[str, Any]]) -> None:
    """Count the models of a script as its command line asks, and write what was found."""
    parser = argparse.ArgumentParser(description=f"Instructions of {of}'s kernels; see the file.")
    parser.add_argument("--capability", type=int, default=90, help="80: A100, 90: H100 and H200")
    parser.add_argument("--out", type=Path, default=script.parent / "results" / f"{script.stem}.json")
    options = parser.parse_args()
    rows = [count(name, options.capability) for name in names]
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    found = {
        "command": f"python -m bench.{script.stem} --capability {options.capability}",
        "versions": key_versions() | {"triton": triton.__version__},
        "models": rows,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
