"""The kernels of `fused_mlp` in Triton's interpreter, against PyTorch: prints a JSON object of what was found.

A process of its own (`TRITON_INTERPRET=1 python -m tests.models.fused_mlp_cases`): Triton decides once, when it is
imported, whether kernels are interpreted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models import create_model, num_drop_paths, set_drop_path_noise
from pipeline.models.fused_mlp import fused_mlp
from pipeline.models.layers import Mlp
from tests.models.block_attention_cases import TYPES, laid_out
from tests.models.interpreted import add_bfloat16
from tests.models.short_training import losses_of

# Rows, channels, hidden channels: of one program and several, with and without a rest in each.
SHAPES = [(33, 20, 52), (128, 64, 256), (150, 96, 200), (1, 192, 64)]
FORMS = ("tanh", "erf", "tanh lean", "erf lean")
LAYOUTS = ("contiguous", "rows apart", "transposed")
SMALL: dict[str, dict[str, Any]] = {
    "nest_micro": {"img_size": 8, "num_levels": 2, "embed_dims": (16, 32), "num_heads": (1, 2), "depths": 1},
    "hvt_ti_1": {"img_size": 32, "patch_size": 8, "num_heads": 1, "head_dim": 16, "depth": 2},
    "refiner_vit_s_linear": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48},
}


def plain(x: Tensor, weight: Tensor, bias: Tensor, weight2: Tensor, bias2: Tensor, tanh: bool) -> Tensor:
    """By definition."""
    return F.linear(F.gelu(F.linear(x, weight, bias), approximate="tanh" if tanh else "none"), weight2, bias2)


def errors(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest error over the largest value, of all; infinite if any is no number."""
    pairs = zip(got, wanted, strict=True)
    found = [float(((a.double() - b).abs().max() / b.abs().max()).nan_to_num(nan=torch.inf)) for a, b in pairs]
    return max(found)


def values() -> dict[str, float]:
    """Of the output and all gradients."""
    found = {}
    for (name, dtype), form in product(TYPES.items(), FORMS):
        exactly = dtype == torch.float64
        for shape, layout in product(SHAPES if exactly else SHAPES[::2], LAYOUTS if exactly else LAYOUTS[:1]):
            rows, dim, hidden = shape
            torch.manual_seed(0)
            drawn = 1.5 * torch.randn(1, rows, dim), 0.3 * torch.randn(hidden, dim), torch.randn(hidden)
            drawn += 0.1 * torch.randn(dim, hidden), torch.randn(dim)
            given = [t.to(dtype) for t in drawn]
            given[0] = laid_out(given[0], layout)
            above = laid_out(torch.randn(1, rows, dim).to(dtype), layout)
            leaves = [t.requires_grad_() for t in given]
            exact = [t.detach().double().requires_grad_() for t in given]
            out = fused_mlp(*leaves, tanh="tanh" in form, lean="lean" in form)
            wanted = plain(*exact, tanh="tanh" in form)
            grads = torch.autograd.grad(out, leaves, above), torch.autograd.grad(wanted, exact, above.double())
            found[f"{name} {shape} {form} {layout}"] = errors([out.detach(), *grads[0]], [wanted.detach(), *grads[1]])
    return found


def models(name: str, **options: Any) -> tuple[Any, Any]:
    """Two models of the same weights: without and with all kernels that there are for them."""
    made = []
    for kernels in ("torch", "triton"):
        torch.manual_seed(0)
        # Heads that begin at 0 would hide everything before them.
        model = create_model(name, num_classes=5, drop_path_rate=0.5, kernels=kernels, **SMALL[name], **options)
        for param in model.parameters():
            torch.nn.init.normal_(param, std=0.1)
        made.append(model)
    assert [m.fused for m in made[1].modules() if isinstance(m, Mlp)] == [True, True]
    return made[0], made[1]


def outcome(run: Any, model: Any) -> list[Tensor]:
    """Logits and gradients in float64, with samples dropped in some branches."""
    side, generator = model.img_size, torch.Generator().manual_seed(1)
    model.zero_grad()
    noise = torch.rand(3, num_drop_paths(model), generator=generator)
    assert (noise[:, -2:] < 0.5).any() and (noise[:, -2:] >= 0.5).any()  # the last layer's
    set_drop_path_noise(model, noise)
    logits = run(torch.randn(3, 3, side, side, dtype=torch.float64, generator=generator))
    F.cross_entropy(logits, torch.tensor([0, 3, 4])).backward()
    grads = [param.grad.flatten() for param in model.parameters() if param.grad is not None]
    return [logits.detach(), torch.cat(grads).clone()]


def whole_models() -> dict[str, float]:
    """Of logits and gradients, plain, recomputed in the backward pass, and through torch.compile in one graph."""
    found = {}
    for name in SMALL:
        wanted, ours = (model.double() for model in models(name))
        expected = outcome(wanted, wanted)
        found[name] = errors(outcome(ours, ours), expected)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        found[f"{name} compiled"] = errors(outcome(compiled, ours), expected)
        ours.set_grad_checkpointing()
        found[f"{name} recomputed"] = errors(outcome(ours, ours), expected)
    return found


def kept() -> dict[str, list[int]]:
    """Columns of what a backward pass will find, and of what an evaluation leaves: GELU's are 40 wide."""
    widths: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        widths.append(saved.shape[-1])
        return saved

    found = {}
    for name, lean, grad in (("", False, True), ("lean", True, True), ("evaluated", False, False)):
        mlp = Mlp(8, 40, kernels="triton").double()
        mlp.lean = lean
        with torch.set_grad_enabled(grad), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            mlp(torch.randn(3, 8, dtype=torch.float64))
        found[name] = sorted(widths)
        widths.clear()
    return found


def frozen() -> dict[str, Any]:
    """The error of the gradients that are left when weights are frozen, also compiled, and the products of a step."""
    model = models("hvt_ti_1")[1].double()
    expected = outcome(model, model)[1]
    whole = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    found: dict[str, Any] = {"products": [products(model)]}
    for name, param in model.named_parameters():
        param.requires_grad_("weight" not in name or "blocks" not in name)
    left = torch.cat([whole[name].flatten() for name, param in model.named_parameters() if param.requires_grad])
    assert left.numel() < expected.numel()
    found["error"] = errors(outcome(model, model)[1:], [left])
    found["products"].append(products(model))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found["compiled"] = errors(outcome(compiled, model)[1:], [left])
    return found


def products(model: Any) -> int:
    """Products of matrices in a step, those inside of kernels aside."""
    with CountProducts() as counter:
        outcome(model, model)
    return counter.count


class CountProducts(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


def training(steps: int, dtype: torch.dtype | None = None) -> list[list[float]]:
    """Losses of the same training without and with the kernels; with `dtype`, by autocast to it."""
    images, labels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3])
    losses = []
    for model in models("nest_micro", attention="mqa"):
        set_drop_path_noise(model, torch.ones(2, num_drop_paths(model)))
        losses.append(losses_of(model, images, labels, steps, dtype))
    return losses


def operators() -> dict[str, dict[str, str]]:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    before, tests = torch.randn(3, 20, dtype=torch.float64), ("test_schema", "test_faketensor")
    hidden = torch.ops.rookery.mlp_hidden.default
    back = torch.ops.rookery.mlp_hidden_backward.default
    return {
        "forward": torch.library.opcheck(hidden, (x, weight, weight[:, 0], True, True), test_utils=tests),
        "evaluation": torch.library.opcheck(hidden, (x, weight, weight[:, 0], False, False), test_utils=tests),
        "backward": torch.library.opcheck(back, (x, weight.t(), before, True, False), test_utils=tests),
        "backward, lean": torch.library.opcheck(back, (x, weight.t(), before, True, True), test_utils=tests),
    }


def programs() -> int:
    """How many programs a compiler makes of an MLP for batches of five sizes."""
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(Mlp(8, 40, kernels="triton"), backend=counter, fullgraph=True)
    for batch in range(2, 7):
        compiled(torch.zeros(batch, 3, 8))
    return counter.frame_count


def main() -> None:
    add_bfloat16()
    found = {
        "programs": programs(),
        "values": values(),
        "operators": operators(),
        "nothing": list(Mlp(8, 40, kernels="triton")(torch.zeros(2, 0, 8)).shape),
        "models": whole_models(),
        "kept": kept(),
        "frozen": frozen(),
        "training": training(50),
        "bfloat16": training(50, torch.bfloat16),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
