"""The kernels of `short_attention` in Triton's interpreter, against PyTorch: prints a JSON object of what was found.

A process of its own (`TRITON_INTERPRET=1 python -m tests.models.short_attention_cases`): Triton decides once, when it
is imported, whether kernels are interpreted.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models import create_model
from pipeline.models import short_attention as module
from pipeline.models.short_attention import short_attention
from tests.models.block_attention_cases import LAYOUTS, TYPES, attention, laid_out
from tests.models.fused_mlp_cases import errors, outcome
from tests.models.interpreted import add_bfloat16
from tests.models.short_training import losses_of

# Sequences, tokens, heads, keys, channels of a head: NesT's at 224 px, HVT's, one tile of queries and many, and a rest.
SHAPES = [(2, 196, 3, 3, 32), (3, 97, 2, 2, 64), (5, 7, 2, 1, 16), (2, 33, 4, 1, 16), (1, 256, 1, 1, 64)]
DIM = 24
MODELS: dict[str, dict[str, Any]] = {
    "nest_micro": {"img_size": 24, "patch_size": 2, "num_levels": 2, "embed_dims": 16, "num_heads": 1, "depths": 1},
    "hvt_ti_1": {"img_size": 20, "patch_size": 4, "num_heads": 2, "head_dim": 16, "depth": 2},
}


def values() -> dict[str, float]:
    """Largest errors of the output and all gradients, over the largest value."""
    found = {}
    for name, dtype in TYPES.items():
        for shape in SHAPES:
            for layout in LAYOUTS if dtype == torch.float64 else LAYOUTS[:1]:
                sequences, tokens, heads, kv_heads, dim = shape
                width = (heads + 2 * kv_heads) * dim
                torch.manual_seed(0)
                # Logits of up to 20 and more: softmax needs its maximum taken away.
                drawn = torch.randn(sequences, tokens, DIM), 0.5 * torch.randn(width, DIM), torch.randn(width)
                given = [t.to(dtype) for t in drawn]
                given[0] = laid_out(given[0], layout)
                above = laid_out(torch.randn(sequences, tokens, heads * dim).to(dtype), layout)
                leaves = [t.requires_grad_() for t in given]
                exact = [t.detach().double().requires_grad_() for t in given]
                out, wanted = short_attention(*leaves, heads, kv_heads), attention(F.linear(*exact), heads, kv_heads)
                grads = torch.autograd.grad(out, leaves, above), torch.autograd.grad(wanted, exact, above.double())
                found[f"{name} {shape} {layout}"] = errors([out.detach(), *grads[0]], [wanted.detach(), *grads[1]])
    return found


def whole_models() -> dict[str, float]:
    """Errors of logits and gradients: plain, recomputed in the backward pass, through torch.compile in one graph."""
    found, calls = {}, []
    taken = module._ShortAttention.apply
    module._ShortAttention.apply = lambda *given: (calls.append(given[0].shape[1]), taken(*given))[1]
    for name, options in MODELS.items():
        made = []
        for kernels in ("torch", "triton"):
            torch.manual_seed(0)
            model = create_model(name, num_classes=5, drop_path_rate=0.0, kernels=kernels, **options).double()
            for param in model.parameters():
                torch.nn.init.normal_(param, std=0.3)
            made.append(model)
        expected = outcome(made[0], made[0])
        found[name] = errors(outcome(made[1], made[1]), expected)
        found[f"{name} tokens"] = sum(calls)
        calls.clear()
        made[1].set_grad_checkpointing()
        found[f"{name} recomputed"] = errors(outcome(made[1], made[1]), expected)
        calls.clear()
    module._ShortAttention.apply = taken
    made[1].set_grad_checkpointing(False)
    compiled = torch.compile(made[1], backend="aot_eager", fullgraph=True)
    return found | {"compiled": errors(outcome(compiled, made[1]), expected)}


def training(dtype: torch.dtype | None) -> list[list[float]]:
    """Losses of the same 50 steps of an HVT without and with the kernels; with `dtype`, by autocast to it."""
    images, labels = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3])
    losses = []
    for kernels in ("torch", "triton"):
        torch.manual_seed(0)
        model = create_model("hvt_ti_1", num_classes=5, drop_path_rate=0.0, kernels=kernels, **MODELS["hvt_ti_1"])
        losses.append(losses_of(model, images, labels, 50, dtype))
    return losses


def main() -> None:
    add_bfloat16()
    qkv = torch.randn(3, 9, 4 * 16, dtype=torch.float64)
    above: Tensor = torch.randn(3, 9, 2 * 16, dtype=torch.float64)
    ours, tests = torch.ops.rookery, ("test_schema", "test_faketensor")
    operators = [
        torch.library.opcheck(ours.short_attention.default, (qkv, 2, 1), test_utils=tests),
        torch.library.opcheck(ours.short_attention_backward.default, (above, qkv, 2, 1), test_utils=tests),
    ]
    weight = torch.zeros(4 * 16, DIM)
    found = {
        "values": values(),
        "operators": operators,
        "nothing": list(short_attention(torch.zeros(0, 9, DIM), weight, weight[:, 0], 2, 1).shape),
        "models": whole_models(),
        "training": training(None),
        "bfloat16": training(torch.bfloat16),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
