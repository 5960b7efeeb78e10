"""Peak memory of a training step and the kernels it launches, without a GPU: counted on the idle one.

    bench/idle_gpu.sh python bench/memory.py [--only NAME,...] [--out bench/results/memory.json]

--only takes the groups that have these models, and writes no file unless --out says where.

Forward, backward and AdamW in bf16, not compiled, as `rookery bench model` does it. The allocator is PyTorch's own and
asks for the same whatever is computed, so there is nothing to spread: a second step takes as much as the first. What
cuDNN would take for its own work comes on top, and PyTorch's flash attention stands for cuDNN's.
"""

from __future__ import annotations

import gc
import json
import shlex
import sys
from typing import Any, NamedTuple

import torch

from bench.idle_gpu.chosen import chosen
from launch.bench_model.contender import contender
from launch.bench_model.measure import tell
from launch.bench_model.runner import Runner
from pipeline.tracking.environment import key_versions

DEVICE = torch.device("cuda")


class Group(NamedTuple):
    """Models at one batch, the first of which the others are compared with."""

    names: tuple[str, ...]
    batch: int
    side: int | None = None


_NESTS = [(f"timm:nest_{size}_jx", f"nest_{size}", f"nest_{size}+triton") for size in ("tiny", "small", "base")]
GROUPS = [
    *(Group(names, 128) for names in _NESTS),
    Group(("nest_tiny_cifar", "nest_tiny_cifar+triton"), 512),
    Group(("deit_small", "hvt_ti_1", *(f"hvt_s_{pools}" for pools in range(5)), "hvt_s_1+triton"), 256),
    *(
        Group(tuple(f"refiner_vit_{size}{way}" for way in ("", "+maps", "+triton", "+checkpoint")), 128)
        for size in "sml"
    ),
    Group(("refiner_vit_l+maps", "refiner_vit_l+triton", "refiner_vit_l+checkpoint"), 64, 448),
    Group(("timm:vit_small_patch16_224", "timm:swin_tiny_patch4_window7_224"), 128),
]


def main() -> None:
    """Count all groups, and write them."""
    wanted, out = chosen("memory", [group.names for group in GROUPS])
    rows = []
    for group in GROUPS:
        if wanted and not wanted & set(group.names):
            continue
        counted = [{"name": name, **count(name, group)} for name in group.names]
        first = counted[0].get("peak_gb")
        for row in counted:
            ratio = row["peak_gb"] / first if first and "peak_gb" in row else None
            rows.append({**row, "batch": group.batch, "side": group.side, "of_the_first": ratio})
            tell(str(rows[-1]))
    report = {
        "command": shlex.join(["bench/idle_gpu.sh", "python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "precision": "bf16",
        "versions": key_versions(),
        "models": rows,
    }
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    if all("failed" in row for row in rows):
        sys.exit("nothing was counted: the idle GPU has no room for any of them")


def count(name: str, group: Group) -> dict[str, Any]:
    """`peak_gb` of two steps and `kernels` of the second; or `failed`."""
    from bench.idle_gpu.build import launches  # which there is where `bench/idle_gpu.sh` calls this

    gc.collect()
    torch.cuda.empty_cache()
    try:
        runner = Runner(contender(name, group.side), "train", group.batch, "bf16", False, DEVICE)
        runner.draw()
        peak = runner.peak_bytes(2)
    except torch.OutOfMemoryError:
        return {"failed": "no room"}
    assert peak is not None, "on a GPU there is a peak"
    before = launches()
    runner.step(0)
    return {"peak_gb": peak / 1e9, "kernels": launches() - before}


if __name__ == "__main__":
    main()
