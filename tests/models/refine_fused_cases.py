"""The kernels of `refine_fused` in Triton's interpreter, against the plain path: prints what was found as JSON.

A process of its own (`TRITON_INTERPRET=1 python -m tests.models.refine_fused_cases`): Triton decides once, when it is
imported, whether kernels are interpreted.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import create_model, refine_calls, refine_fused
from pipeline.models.refine_maps import OfficialRefiner
from tests.models.interpreted import add_bfloat16
from tests.models.refiner_step import errors, kept_bytes, some_maps, step, with_weights
from tests.models.short_training import losses_of


class Case(NamedTuple):
    """A refiner and its maps: samples, heads, expansion, side of the local kernels, rows and columns of a map.

    Attributes:
        group: samples of a group of statistics; None: all.
        slices: that the expanded maps of a group are computed in; 1 / n: n groups are refined together.
        records: of small programs, and all but two of them merged before they are used; as in large maps.
        contiguous: how the maps lie in memory.
        dtype: name of their type.
    """

    samples: int
    heads: int
    expansion: int
    kernel: int
    rows: int
    columns: int
    group: int | None = None
    slices: float = 1
    records: bool = False
    contiguous: bool = True
    dtype: str = "float64"


# A program takes 16 or 32 columns of float64, and 32 rows: these fit, leave a rest, and are fewer than one has.
CASES = {
    "small": Case(4, 3, 3, 3, 7, 7),
    "wide": Case(4, 3, 3, 3, 5, 11),
    "many rows": Case(2, 3, 1, 3, 37, 3),
    "one sample": Case(1, 2, 3, 3, 4, 35),
    "one head": Case(2, 1, 6, 3, 6, 5),
    "one row": Case(3, 2, 2, 3, 1, 9),
    "twelve heads": Case(2, 12, 3, 3, 6, 6),
    "more heads than channels of a product": Case(2, 17, 1, 1, 3, 8),
    "kernel 1": Case(4, 2, 1, 1, 5, 11),
    "kernel 5": Case(2, 4, 2, 5, 5, 6),
    "slices": Case(3, 3, 3, 3, 5, 7, slices=3),
    "groups one by one": Case(6, 3, 3, 3, 5, 7, group=2),
    "groups and slices": Case(4, 3, 3, 3, 5, 7, group=2, slices=2),
    "groups together": Case(6, 3, 3, 3, 5, 7, group=2, slices=1 / 3),
    "groups in two lots": Case(6, 3, 2, 3, 7, 5, group=1, slices=1 / 4),
    "many records": Case(2, 2, 1, 3, 12, 96, group=1, slices=1 / 2, records=True),
    "not contiguous": Case(2, 3, 3, 3, 6, 4, contiguous=False),
    "float32": Case(4, 3, 3, 3, 7, 7, dtype="float32"),
}
SMALL: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "stem": "patch",
    "embed_dim": 12,
    "num_heads": 3,
    "depth": 2,
    "num_classes": 5,
    "drop_path_rate": 0.0,
}


def differences(case: Case, device: str = "cpu") -> tuple[dict[str, float], dict[str, float]]:
    """Largest errors of what a training step leaves behind over the largest value: by the kernels, and by PyTorch."""
    plain = with_weights(OfficialRefiner(case.heads, case.expansion, case.kernel, 0.176)).to(device).train()
    maps = some_maps(case.samples, case.heads, case.rows, case.columns, case.contiguous).to(device)
    assert maps.is_contiguous() == case.contiguous
    exact = step(copy.deepcopy(plain).double(), maps, None, case.group)
    dtype = getattr(torch, case.dtype)
    elements = (case.group or case.samples) * plain.expand.out_channels * maps[0, 0].numel()
    found = []
    for fused in (True, False):
        refiner = copy.deepcopy(plain).to(dtype)
        refiner.fused = fused
        programs = {"FEWEST_TILES": 1, "GATHERED": 2} if case.records else {"FEWEST_TILES": 8}
        slices = mock.patch.object(refine_fused, "SLICE", math.ceil(elements / case.slices))
        with slices, mock.patch.multiple(refine_calls, **programs):
            left = step(refiner, maps.to(dtype), None, case.group)
        found.append(errors({name: value.double() for name, value in left.items()}, exact))
    return found[0], found[1]


def apart(device: str = "cpu") -> dict[str, float]:
    """Largest differences of what a group gives alone and beside others."""
    refiner = with_weights(OfficialRefiner(3, 3, 3, 0.176)).to(device).train()
    refiner.fused = True
    maps = some_maps(4, 3, 6, 7).to(device).float()
    found = []
    for elements in (1, 2**28):
        with mock.patch.object(refine_fused, "SLICE", elements):
            found.append(step(copy.deepcopy(refiner), maps, None, 1))
    return {name: float((found[0][name] - found[1][name]).abs().max()) for name in ("out", "maps")}


def worst(found: dict[str, float], running: bool) -> float:
    return max(error for name, error in found.items() if ("running" in name) == running)


def half_precision(dtype: torch.dtype, device: str = "cpu", draws: int = 4) -> dict[str, dict[str, float]]:
    """Errors against float64 under autocast, of the kernels and of PyTorch, on maps as flat as fresh ones are.

    Of some draws the root of the mean square: a single one has few pixels, and few weights that they are summed for.
    """
    plain = with_weights(OfficialRefiner(3, 3, 3, 0.176)).to(device).train()
    squares: dict[str, dict[str, float]] = {"plain": {}, "fused": {}}
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        flat = (0.05 * torch.randn(3, 3, 20, 20, generator=generator).double()).softmax(-1).to(device)
        # Numbers that every type has: the kernels give out half precision, so that is what they are handed, too.
        above = torch.randn(flat.shape, generator=generator).bfloat16().to(device)
        exact = step(copy.deepcopy(plain).double(), flat, None, None, above)
        # The gradient of the third BatchNorm's bias is nothing but rounding.
        names = [n for n in exact if n != "bn3.bias" and "running" not in n and "tracked" not in n]
        for name, found in squares.items():
            refiner = copy.deepcopy(plain)
            refiner.fused = name == "fused"
            with torch.autocast(device, dtype):
                left = step(refiner, flat.float(), None, None, above)
            assert all(left[n].dtype == torch.float32 for n in exact if n != "out" and "tracked" not in n)
            for n in names:
                error = float((left[n].double() - exact[n]).norm() / exact[n].norm())
                found[n] = found.get(n, 0.0) + error**2 / draws
    return {name: {n: math.sqrt(square) for n, square in found.items()} for name, found in squares.items()}


def models() -> tuple[nn.Module, nn.Module]:
    """Two Refiners of the same weights: with PyTorch's operations and with the kernels."""
    torch.manual_seed(0)
    plain = create_model("refiner_vit_s", **SMALL)
    ours = create_model("refiner_vit_s", **SMALL, kernels="triton")
    ours.load_state_dict(plain.state_dict())
    return plain.train(), ours.train()


def whole_model() -> float:
    """The largest error of logits and gradients of a Refiner in float64."""
    images, labels = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3, 4])
    found: list[dict[str, Tensor]] = []
    for model in models():
        logits = model.double()(images)
        F.cross_entropy(logits, labels).backward()
        found.append({"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    return max(errors(found[1], found[0]).values())


def training(steps: int, dtype: torch.dtype | None = None) -> list[list[float]]:
    """Losses of the same training without and with the kernels; with `dtype`, by autocast to it."""
    images, labels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3])
    return [losses_of(model, images, labels, steps, dtype) for model in models()]


def kept() -> float:
    """Of the maps that autograd keeps, how many times those of one per head."""
    refiner = with_weights(OfficialRefiner(3, 3, 3, 0.176)).train()
    refiner.fused = True
    maps = some_maps(2, 3, 12, 12).float().requires_grad_()
    size = maps.untyped_storage().nbytes()
    return kept_bytes(lambda: refiner(maps), size // 4) / size


def compiled() -> float:
    """The largest error through torch.compile, in one graph."""
    refiner = with_weights(OfficialRefiner(2, 2, 3, 0.176)).double().train()
    refiner.fused = True
    traced = copy.deepcopy(refiner)
    traced.forward = torch.compile(traced.forward, backend="aot_eager", fullgraph=True)
    maps = some_maps(2, 2, 5, 5)
    return max(errors(step(traced, maps, None, 1), step(refiner, maps, None, 1)).values())


def operator() -> dict[str, str]:
    """What PyTorch's own check of an operator finds."""
    refiner = with_weights(OfficialRefiner(2, 1, 1, 0.176)).double()
    norms = (refiner.bn1, refiner.bn2, refiner.bn3)
    parameters = [
        p for conv, norm in zip((refiner.expand, refiner.local, refiner.reduce), norms, strict=True)
        for p in (conv.weight, norm.weight, norm.bias)
    ]  # fmt: skip
    parameters += [refiner.adapt_bn.weight, refiner.adapt_bn.bias]
    maps = some_maps(2, 2, 3, 3).requires_grad_()
    return torch.library.opcheck(torch.ops.rookery.refine.default, (maps, parameters, 2, 1e-5, 0.176))


def main() -> None:
    add_bfloat16()
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    print(
        json.dumps(
            {
                "values": {name: differences(case) for name, case in CASES.items()},
                "half": {name: half_precision(getattr(torch, name)) for name in ("float16", "bfloat16")},
                "model": whole_model(),
                "training": training(steps),
                "bfloat16": training(steps, torch.bfloat16),
                "kept": kept(),
                "apart": apart(),
                "compiled": compiled(),
                "operator": operator(),
            }
        )
    )


if __name__ == "__main__":
    main()
