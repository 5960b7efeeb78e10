"""The parts of bench/gpu.sh: checks of the fast paths, then measurements with `launch.bench_model`."""

from __future__ import annotations

import argparse
import copy
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.bench_model.measure import bench_model, tell
from pipeline.models import create_model, fold_refiners, num_drop_paths, set_drop_path_noise, set_lean
from pipeline.models.batch_norm import group_statistics
from pipeline.models.block_attention import block_attention
from pipeline.models.refine_maps import OfficialRefiner
from pipeline.models.timm_weights import from_timm
from pipeline.tracking.environment import device_name, key_versions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEST, SWIN, VIT = "timm:nest_tiny_jx", "timm:swin_tiny_patch4_window7_224", "timm:vit_small_patch16_224"
OTHERS = [SWIN, VIT, "timm:deit_small_patch16_224"]
REFINERS = ["refiner_vit_s", "refiner_vit_s+maps", "refiner_vit_s+checkpoint", "refiner_vit_s+triton"]
# Pictures of 32 px, blocks of 16 tokens: PyTorch's attention and ours.
CIFAR = ["nest_tiny_cifar", "nest_tiny_cifar+triton"]
HVTS = ["deit_small", "hvt_ti_1", *(f"hvt_s_{pools}" for pools in range(5))]
MODELS = ["nest_tiny", NEST, "hvt_s_1", *REFINERS, "refiner_vit_s+fold", *OTHERS]


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
    "compiled": Part(["nest_tiny", NEST, "hvt_s_1", SWIN], NEST, 128, compiled=True, repeats=3, seconds=0.5),
    "largest": Part(["nest_tiny", NEST, *REFINERS], NEST, None, phases=("train",), repeats=3),
    "cifar": Part(CIFAR, CIFAR[0], 512),
    "cifar_compiled": Part(CIFAR, CIFAR[0], 512, compiled=True, repeats=3, seconds=0.5),
    "nest_small": Part(["nest_small", "timm:nest_small_jx"], "timm:nest_small_jx", 128),
    "nest_base": Part(["nest_base", "timm:nest_base_jx"], "timm:nest_base_jx", 128),
    "nest_base_compiled": Part(
        ["nest_base", "timm:nest_base_jx"], "timm:nest_base_jx", 128, compiled=True, repeats=3, seconds=0.5
    ),
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
# Measured by other means than models are.
KERNELS = "refine_kernels"
NAMES = ["checks", *PARTS, KERNELS]
# What marks the models of opt-in kernels: if these are wrong, the others are measured all the same.
OPT_IN = "+triton"
_SMALL = ["deit_tiny", "timm:vit_tiny_patch16_224", "refiner_vit_s+maps"]
TINY = {
    "eager": Part(_SMALL, _SMALL[1], 2, side=32, repeats=2, seconds=0.0),
    "compiled": Part(_SMALL[:2], _SMALL[1], 2, phases=("infer",), side=32, repeats=2, seconds=0.0),
}


def main() -> int:
    """Run the parts that were asked for while there is time; 1 if a check fails or anything was left out."""
    parser = argparse.ArgumentParser(description="Measure this package's models on a GPU; see bench/gpu.sh.")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--minutes", type=float, default=8.5, help="no part is begun after two thirds of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if DEVICE.type == "cpu" and not options.tiny:
        parser.error("there is no GPU here; --tiny tries the script on a CPU")
    parts, began, status = TINY if options.tiny else PARTS, time.monotonic(), 0
    command = shlex.join(["bench/gpu.sh", *sys.argv[1:]])
    wrong: list[str] = []
    for name in options.only.split(","):
        if name not in NAMES:
            parser.error(f"--only {name}: there is {', '.join(NAMES)}")
        part = None
        if name != "checks":
            part = without(parts[name], OPT_IN) if wrong and name in parts else parts.get(name)
            if part is None and (name != KERNELS or wrong or DEVICE.type == "cpu"):
                continue
        if time.monotonic() - began > 40 * options.minutes:
            tell(f"no time left for {name}: run it by --only {name}")
            status = 1
            continue
        tell(name)
        if name == "checks":
            report = check(command, options.tiny)
        else:
            report = kernels(command, options.tiny) if part is None else measured(part, command)
        report["minutes"] = (time.monotonic() - began) / 60
        (options.out / f"model_{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        failed = [row for row in report.get("checks", ()) if not row["passed"]]
        if not all(row["opt_in"] for row in failed):
            tell(f"the fast paths are wrong, nothing is measured: {failed}")
            return 1
        if failed:
            wrong, status = [row["name"] for row in failed], 1
            tell(f"opt-in kernels are wrong, models with {OPT_IN} are left out: {failed}")
    return status


def without(part: Part, suffix: str) -> Part | None:
    """The part without models of such names; None if none is left to compare."""
    names = [name for name in part.names if not name.endswith(suffix)]
    return replace(part, names=names) if len(names) > 1 and part.against in names else None


def kernels(command: str, tiny: bool) -> dict[str, Any]:
    """The report of `refine_kernels`: for Refiner-S and -L, 128 samples in groups of 32."""
    from bench.refine_kernels import refine_kernels

    samples, tokens, repeats = (8, 17, 1) if tiny else (128, 197, 20)
    rows = {f"{heads} heads": refine_kernels(samples, 4, heads, tokens, repeats) for heads in (12, 16)}
    return {
        "command": command,
        "device": device_name(),
        "versions": key_versions(),
        "microseconds_a_sample": rows,
        "batch": samples,
        "repeats": repeats,
    }


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


def check(command: str, tiny: bool) -> dict[str, Any]:
    """Largest differences between fast paths and plain ones, over the largest value, and what is allowed."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found: list[dict[str, Any]] = []

    def add(name: str, got: Sequence[Tensor], wanted: Sequence[Tensor], allowed: float) -> None:
        error = _error(got, wanted)
        # What is allowed may be another path's error, and that be infinite.
        passed = math.isfinite(error) and error <= allowed
        found.append({"name": name, "error": error, "allowed": allowed, "passed": passed, "opt_in": False})

    def add_opt_in(name: str, both: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]], allowed: float) -> None:
        try:
            add(name, *both(), allowed)
            found[-1]["opt_in"] = True
        except Exception as error:  # such as what a compiler says of a kernel
            found.append({"name": name, "error": repr(error)[:500], "passed": False, "opt_in": True})

    nest, theirs, side = _nests(tiny)
    images = torch.randn(4, 3, side, side, device=DEVICE, generator=_seeded())
    with torch.inference_mode():
        add("NesT's logits are timm's, fp32", [nest(images)], [theirs(images)], 1e-4)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            add("NesT's logits are timm's, bf16", [nest(images).float()], [theirs(images).float()], 0.05)
        compiled: Callable[[Tensor], Tensor] = torch.compile(nest, backend="aot_eager" if tiny else "inductor")
        add("compiled NesT, fp32", [compiled(images)], [nest(images)], 1e-4)
    for name in ("refiner_vit_s", "refiner_vit_s_linear"):
        model = _refiner(name, tiny)
        images = torch.randn(4, 3, model.img_size, model.img_size, device=DEVICE, generator=_seeded()).double()
        add(f"{name} that keeps few maps, fp64", _step(model, images, True), _step(model, images, False), 1e-6)
        model.eval()
        with torch.inference_mode():
            add(f"{name} folded, fp64", [fold_refiners(model)(images)], [model(images)], 1e-9)
    if DEVICE.type == "cuda":
        for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
            for shape in ((37, 16, 3, 1, 64), (5, 64, 4, 4, 32)):
                add_opt_in(f"attention in blocks {shape}, {dtype}", partial(_block_attention, shape, dtype), allowed)
        for dtype, allowed in ((torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 0.05)):
            for shape in ((3, 12, 197, 3), (6, 16, 50, 2)):
                # Half precision moves a pixel past a bend of ReLU6 here and there, whoever computes.
                lean = 2 * _error(*_refined(shape, dtype, fused=False))
                refined = partial(_refined, shape, dtype, fused=True)
                add_opt_in(f"refined maps {shape}, {dtype}", refined, max(allowed, lean))
        model = _refiner("refiner_vit_s", tiny)
        images = torch.randn(4, 3, model.img_size, model.img_size, device=DEVICE, generator=_seeded()).double()
        plain = _step(model, images, False)
        for module in model.modules():
            if isinstance(module, OfficialRefiner):
                module.fused = True
        add_opt_in("refiner_vit_s by kernels, fp64", lambda: (_step(model, images, False), plain), 1e-6)
    return {"command": command, "device": device_name(), "versions": key_versions(), "checks": found}


def _error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True)]
    # Python's max passes over a NaN.
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _block_attention(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradient of the kernels for (blocks, tokens, heads, keys, channels), and of PyTorch in float64."""
    blocks, tokens, heads, kv_heads, dim = shape
    qkv = torch.randn(blocks, tokens, (heads + 2 * kv_heads) * dim, device=DEVICE, generator=_seeded()).to(dtype)
    above = torch.randn(blocks, tokens, heads * dim, device=DEVICE, generator=_seeded()).to(dtype)
    ours, plain = qkv.requires_grad_(), qkv.detach().double().requires_grad_()
    out = block_attention(ours, heads, kv_heads)
    widths = [heads * dim, kv_heads * dim, kv_heads * dim]
    q, k, v = (part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in plain.split(widths, -1))
    maps = torch.softmax(q @ k.transpose(-2, -1) * dim**-0.5, -1)
    expected = (maps @ v).transpose(1, 2).flatten(2)
    got = [out, *torch.autograd.grad(out, ours, above)]
    return [t.detach().double() for t in got], [
        expected.detach(),
        *torch.autograd.grad(expected, plain, above.double()),
    ]


def _refined(shape: tuple[int, ...], dtype: torch.dtype, fused: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients by the kernels or `refine_lean`, and by plain float64.

    Args:
        shape: samples, heads, tokens, samples of a group of statistics.
    """
    samples, heads, tokens, group = shape
    torch.manual_seed(0)
    plain = OfficialRefiner(heads, 3, 3, 0.176).to(DEVICE, torch.float64).train()
    group_statistics(plain, group)
    maps = torch.randn(samples, heads, tokens, tokens, device=DEVICE, generator=_seeded()).softmax(-1).to(dtype)
    above = torch.randn(maps.shape, device=DEVICE, generator=_seeded()).to(dtype)
    ours = copy.deepcopy(plain).to(torch.promote_types(dtype, torch.float32))
    ours.fused, ours.lean = fused, not fused
    found = []
    for refiner, leaf in ((ours, maps.clone()), (plain, maps.double())):
        out = refiner(leaf.requires_grad_())
        out.backward(above.to(out.dtype))
        # The third BatchNorm's bias has no gradient but rounding.
        grads = [p.grad for name, p in refiner.named_parameters() if name != "bn3.bias" and p.grad is not None]
        found.append([t.detach().double() for t in (out, leaf.grad, *grads) if t is not None])
    return found[0], found[1]


def _nests(tiny: bool) -> tuple[nn.Module, nn.Module, int]:
    """NesT-T and timm's with the same weights."""
    import timm

    side = 64 if tiny else 224
    sizes = {"img_size": side} if tiny else {}
    theirs = timm.create_model("nest_tiny_jx", **sizes)
    ours = create_model("nest_tiny", img_size=side, gelu="erf")
    ours.load_state_dict(from_timm(theirs.state_dict(), ours))
    return ours.to(DEVICE).eval(), theirs.to(DEVICE).eval(), side


def _refiner(name: str, tiny: bool) -> Any:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48} if tiny else {}
    torch.manual_seed(0)
    return create_model(name, drop_path_rate=0.1, **sizes).to(DEVICE, torch.float64)


def _step(model: Any, images: Tensor, lean: bool) -> list[Tensor]:
    """Loss, gradients and running statistics of a training step."""
    model = copy.deepcopy(model).train()
    set_lean(model, lean)
    noise = torch.rand(len(images), num_drop_paths(model), device=DEVICE, generator=_seeded())
    set_drop_path_noise(model, noise)
    loss = F.cross_entropy(model(images), torch.arange(len(images), device=DEVICE))
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    running = [b.flatten() for name, b in model.named_buffers() if "running" in name]
    return [loss[None].detach(), gradients, torch.cat(running) if running else loss[None].detach()]


def _seeded() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(1)


if __name__ == "__main__":
    sys.exit(main())
