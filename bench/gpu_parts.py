"""The parts of bench/gpu.sh, and the process that works on some of them.

    python bench/gpu_parts.py PART ... --out FOLDER --command COMMAND --seconds N [--tiny] [--plain PART ...]

It says "begin PART" and "end PART" on stdout, or "failed" and why, with which it ends.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import gpu_checks
from launch.bench_model.measure import bench_model
from pipeline.tracking.environment import device_name, key_versions

NEST, SWIN, VIT = "timm:nest_tiny_jx", "timm:swin_tiny_patch4_window7_224", "timm:vit_small_patch16_224"
OTHERS = [SWIN, VIT, "timm:deit_small_patch16_224"]
REFINERS = ["refiner_vit_s", "refiner_vit_s+maps", "refiner_vit_s+checkpoint", "refiner_vit_s+triton"]
# Pictures of 32 px, blocks of 16 tokens: PyTorch's operations and our kernels.
CIFAR = ["nest_tiny_cifar", "nest_tiny_cifar+triton"]
HVTS = ["deit_small", "hvt_ti_1", *(f"hvt_s_{pools}" for pools in range(5)), "hvt_s_1+triton"]
MODELS = ["nest_tiny", "nest_tiny+triton", NEST, "hvt_s_1", *REFINERS, "refiner_vit_s+fold", *OTHERS]
NESTS = {size: [f"nest_{size}", f"nest_{size}+triton", f"timm:nest_{size}_jx"] for size in ("small", "base")}


@dataclass(frozen=True)
class Part:
    """Arguments of one `bench_model`."""

    names: Sequence[str]
    against: str
    batch: int | None
    compiled: bool = False
    phases: Sequence[str] = ("train", "infer")
    side: int | None = None
    repeats: int = 5
    seconds: float = 1.0


PARTS = {
    "eager": Part(MODELS, NEST, 128),
    "compiled": Part(
        ["nest_tiny", "nest_tiny+triton", NEST, "hvt_s_1", "hvt_s_1+triton", SWIN],
        NEST,
        128,
        compiled=True,
        repeats=3,
        seconds=0.5,
    ),
    "largest": Part(["nest_tiny", "nest_tiny+triton", NEST, *REFINERS], NEST, None, phases=("train",), repeats=3),
    "cifar": Part(CIFAR, CIFAR[0], 512),
    "cifar_compiled": Part(CIFAR, CIFAR[0], 512, compiled=True, repeats=3, seconds=0.5),
    "nest_small": Part(NESTS["small"], "timm:nest_small_jx", 128),
    "nest_base": Part(NESTS["base"], "timm:nest_base_jx", 128),
    "nest_base_compiled": Part(NESTS["base"], "timm:nest_base_jx", 128, compiled=True, repeats=3, seconds=0.5),
    "hvts": Part(HVTS, HVTS[0], 256, repeats=3, seconds=0.5),
    "refiners": Part(
        [f"refiner_vit_{size}+{way}" for size in "ml" for way in ("maps", "triton")],
        "refiner_vit_m+maps",
        64,
        phases=("train",),
        repeats=3,
    ),
    "refiner_448": Part(
        ["refiner_vit_l+maps", "refiner_vit_l+triton"], "refiner_vit_l+maps", 64, phases=("train",), side=448, repeats=3
    ),
    "compiled_refiner": Part(REFINERS, REFINERS[0], 128, compiled=True, phases=("train",), repeats=3, seconds=0.5),
    # How soon a compiled training starts: as one, and layer by layer.
    "starts": Part(
        ["nest_base", "nest_base+compile", "nest_base+layers"], "nest_base", 128, phases=("train",), repeats=3
    ),
}
# In the order of measuring; the first two check, the last one measures kernels in place of models.
CHECKS, KERNEL_CHECKS, KERNELS = "checks", "kernel_checks", "refine_kernels"
NAMES = [CHECKS, KERNEL_CHECKS, *PARTS, KERNELS]
# What marks the models of opt-in kernels.
OPT_IN = "+triton"
_SMALL = ["deit_tiny", "timm:vit_tiny_patch16_224", "refiner_vit_s+maps"]
TINY = {
    "eager": Part(_SMALL, _SMALL[1], 2, side=32, repeats=2, seconds=0.0),
    "compiled": Part(_SMALL[:2], _SMALL[1], 2, phases=("infer",), side=32, repeats=2, seconds=0.0),
}


def main() -> int:
    """Work on the parts one after the other; 1 if one fails."""
    parser = argparse.ArgumentParser(description="Some parts of bench/gpu.sh; see there.")
    parser.add_argument("parts", nargs="+", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--command", required=True, help="for the reports")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--plain", action="append", default=[], help="a part to do without opt-in kernels")
    parser.add_argument("--seconds", type=float, required=True, help="no part is begun after them")
    options = parser.parse_args()
    end_with_parent()
    until = time.monotonic() + options.seconds
    for name in options.parts:
        if time.monotonic() > until:
            break
        print(f"begin {name}", flush=True)
        path, began = options.out / f"model_{name}.json", time.monotonic()
        report: dict[str, Any] = {"command": options.command}
        write(path, report)
        why = ""
        try:
            for found in work(name, options.command, options.tiny, name in options.plain):
                report |= found | {"minutes": (time.monotonic() - began) / 60}
                write(path, report)
        except Exception as error:
            traceback.print_exc()
            why = str(error) or repr(error)
        wrong = [row for row in report.get("checks", ()) if not row["passed"]]
        if why or wrong:
            # What was wrong first: an error may be only what a kernel before it left behind.
            print(f"failed {wrong or why}"[:2000].replace("\n", " "), flush=True)
            return 1
        print(f"end {name}", flush=True)
    return 0


def write(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all: the process may be ended any time."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(path)


def end_with_parent() -> None:
    """A kill of the process that started this one doesn't reach its session; it would keep the GPU."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def work(name: str, command: str, tiny: bool, plain: bool) -> Iterator[dict[str, Any]]:
    """What is known of a part, again each time that there is more."""
    about = {"device": device_name(), "versions": key_versions()}
    if name in (CHECKS, KERNEL_CHECKS):
        rows: list[dict[str, Any]] = []
        yield about | {"checks": rows}
        for row in (gpu_checks.fast_paths if name == CHECKS else gpu_checks.kernels)(tiny):
            rows.append(row)
            yield {"checks": rows}
    elif name == KERNELS:
        yield about | kernels(tiny)
    else:
        part = chosen(name, tiny, plain)
        assert part is not None
        yield measured(part, command)


def there_is(name: str, tiny: bool, gpu: bool, plain: bool) -> bool:
    """Whether a part has anything to do."""
    if name in (KERNEL_CHECKS, KERNELS):
        return gpu and not plain
    return name == CHECKS or chosen(name, tiny, plain) is not None


def has_opt_in(name: str, tiny: bool) -> bool:
    """Whether it has models of opt-in kernels, and others."""
    return chosen(name, tiny, True) not in (None, chosen(name, tiny, False))


def chosen(name: str, tiny: bool, plain: bool) -> Part | None:
    """A part as it is measured; None if there is nothing to compare."""
    part = (TINY if tiny else PARTS).get(name)
    return without(part, OPT_IN) if part and plain else part


def without(part: Part, suffix: str) -> Part | None:
    """The part without models of such names; None if none is left to compare."""
    names = [name for name in part.names if not name.endswith(suffix)]
    return replace(part, names=names) if len(names) > 1 and part.against in names else None


def kernels(tiny: bool) -> dict[str, Any]:
    """Of Refiner-S and -L, 128 samples in groups of 32."""
    from bench.refine_kernels import refine_kernels

    samples, tokens, repeats = (8, 17, 1) if tiny else (128, 197, 20)
    rows = {f"{heads} heads": refine_kernels(samples, 4, heads, tokens, repeats) for heads in (12, 16)}
    return {"microseconds_a_sample": rows, "batch": samples, "repeats": repeats}


def measured(part: Part, command: str) -> dict[str, Any]:
    """The report of one part."""
    return bench_model(
        part.names,
        against=part.against,
        phases=part.phases,  # type: ignore[arg-type]
        batch=part.batch,
        precision="bf16",
        compiled=part.compiled,
        side=part.side,
        repeats=part.repeats,
        seconds=part.seconds,
        peak=None,
        command=command,
    )


if __name__ == "__main__":
    sys.exit(main())
