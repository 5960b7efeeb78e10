"""The kernels of `sum_norm` in Triton's interpreter, against PyTorch: prints a JSON object of what was found.

A process of its own (`TRITON_INTERPRET=1 python -m tests.models.sum_norm_cases`): Triton decides once, when it is
imported, whether kernels are interpreted.
"""

from __future__ import annotations

import json
from itertools import product

import torch
from torch import Tensor, nn

from pipeline.models.sum_norm import add_branch, sum_norm
from tests.models.block_attention_cases import TYPES, laid_out
from tests.models.fused_mlp_cases import errors
from tests.models.interpreted import add_bfloat16

# Samples, tokens, channels: of one program and several, with and without a rest in each.
SHAPES = [(3, 11, 20), (2, 40, 96), (5, 1, 420), (1, 300, 8)]
# What is added, and whether there is a LayerNorm.
FORMS = ("norm", "branch norm", "branch bias scale norm", "branch bias", "branch scale times")
LAYOUTS = ("contiguous", "rows apart", "transposed")


def plain(form: str, x: Tensor, branch: Tensor, bias: Tensor, scale: Tensor, norm: nn.LayerNorm) -> list[Tensor]:
    """By definition: what there is of the sum and its LayerNorm."""
    added = (branch + bias if "bias" in form else branch) * (3.0 if "times" in form else 1.0)
    total = x + (added * scale[:, None, None] if "scale" in form else added) if "branch" in form else x
    return [total, norm(total)] if "norm" in form else [total]


def ours(form: str, x: Tensor, branch: Tensor, bias: Tensor, scale: Tensor, norm: nn.LayerNorm) -> list[Tensor]:
    """By the kernels."""
    chosen = bias if "bias" in form else None, scale if "scale" in form else None, 3.0 if "times" in form else 1.0
    if "norm" not in form:
        return [add_branch(x, branch, *chosen)]
    return list(sum_norm(x, norm, branch, *chosen) if "branch" in form else sum_norm(x, norm))


def value(form: str, shape: tuple[int, int, int], kind: str, layout: str, device: str = "cpu") -> float:
    """The largest error of results and gradients; the residual sum of half precision is in float32, as by autocast."""
    samples, _, dim = shape
    half = TYPES[kind].itemsize == 2
    wide = torch.float32 if half else TYPES[kind]
    torch.manual_seed(0)
    x, branch = (2 * torch.randn(shape) + 3).to(wide), torch.randn(shape).to(TYPES[kind])
    bias, scale = torch.randn(dim).to(wide), torch.rand(samples).to(wide)
    norm = nn.LayerNorm(dim, eps=1e-3).to(wide)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    exact_norm = nn.LayerNorm(dim, eps=1e-3).double()
    exact_norm.load_state_dict(norm.state_dict())
    given = [laid_out(x, layout), laid_out(branch, layout), bias]
    used = [True, "branch" in form, "bias" in form]
    found = []
    for compute, of_norm, exactly in ((ours, norm, False), (plain, exact_norm, True)):
        leaves = [(t.double() if exactly else t).to(device).detach().requires_grad_() for t in given]
        with torch.autocast(device, TYPES[kind] if half else torch.bfloat16, enabled=half and not exactly):
            results = compute(form, *leaves, (scale.double() if exactly else scale).to(device), of_norm.to(device))
        torch.manual_seed(1)
        above = [laid_out(torch.randn(shape).to(TYPES[kind]), layout).to(result) for result in results]
        wanted = [leaf for leaf, there in zip(leaves, used, strict=True) if there]
        wanted += list(of_norm.parameters()) if "norm" in form else []
        found.append([t.detach() for t in (*results, *torch.autograd.grad(results, wanted, above))])
    return errors(*found)


def values() -> dict[str, float]:
    found = {}
    for kind, form in product(TYPES, FORMS):
        exactly = kind == "float64"
        for shape, layout in product(SHAPES if exactly else SHAPES[:2], LAYOUTS if exactly else LAYOUTS[:1]):
            found[f"{kind} {shape} {form} {layout}"] = value(form, shape, kind, layout)
    return found


def types() -> list[str]:
    """Of the sum and its LayerNorm under autocast, and of the gradients of x, the branch, its bias, and the weight."""
    x, branch, bias = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8, dtype=torch.bfloat16), torch.zeros(8)
    leaves = [t.requires_grad_() for t in (x, branch, bias)]
    norm = nn.LayerNorm(8)
    with torch.autocast("cpu", torch.bfloat16):
        results = sum_norm(x, norm, branch, bias)
    sum(t.float().sum() for t in results).backward()
    return [str(t.dtype) for t in (*results, *(leaf.grad for leaf in (*leaves, norm.weight)))]


def operators() -> dict[str, dict[str, str]]:
    x, one = torch.randn(6, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    scale, tests = torch.rand(2, dtype=torch.float64), ("test_schema", "test_faketensor")
    forward = torch.ops.rookery.sum_norm.default
    backward = torch.ops.rookery.sum_norm_backward.default
    kind = torch.float64
    cases = {
        "norm": (forward, (x, None, None, None, 1.0, one, one, 1e-6, kind)),
        "sum and norm": (forward, (x, x + 1, one, scale, 2.0, one, one, 1e-6, kind)),
        "sum": (forward, (x, x + 1, None, None, 1.0, None, None, 0.0, kind)),
        "back from the norm": (backward, (x, x + 1, x + 2, None, 1.0, one, 1e-6, kind, None, False)),
        "back from both": (backward, (x, x + 1, x + 2, scale, 2.0, one, 1e-6, kind, kind, True)),
        "back from the sum": (backward, (x, None, None, None, 1.0, None, 0.0, kind, kind, True)),
    }
    return {name: torch.library.opcheck(op, given, test_utils=tests) for name, (op, given) in cases.items()}


def nothing() -> list[list[float]]:
    """Shapes of what a batch of nothing gives, and the gradient of a weight."""
    norm, x = nn.LayerNorm(8), torch.zeros(0, 3, 8, requires_grad=True)
    results = sum_norm(x, norm, torch.zeros(0, 3, 8), torch.zeros(8), torch.zeros(0))
    results[1].sum().backward()
    return [*(list(t.shape) for t in results), norm.weight.grad.tolist()]


def main() -> None:
    add_bfloat16()
    found = {
        "values": values(),
        "types": types(),
        "operators": operators(),
        "nothing": nothing(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
