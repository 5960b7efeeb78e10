"""The kernels of `block_attention` in Triton's interpreter, against PyTorch: prints a JSON object of what was found.

A process of its own (`TRITON_INTERPRET=1 python -m tests.models.block_attention_cases`): Triton decides once, when it
is imported, whether kernels are interpreted.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models import create_model
from pipeline.models.block_attention import block_attention
from tests.models.interpreted import add_bfloat16

# Blocks, tokens, heads, keys, channels of a head.
SHAPES = [
    (5, 16, 3, 1, 64),
    (3, 16, 3, 3, 32),
    (1, 64, 2, 1, 16),
    (9, 16, 1, 1, 128),
    (4, 64, 2, 2, 32),
    (8, 16, 6, 1, 16),
]
TYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
LAYOUTS = ("contiguous", "rows apart", "transposed")
SMALL: dict[str, object] = {
    "drop_path_rate": 0.0,
    "img_size": 8,
    "num_levels": 2,
    "embed_dims": (16, 32),
    "num_heads": (1, 2),
    "depths": 1,
    "num_classes": 5,
}


def attention(qkv: Tensor, heads: int, kv_heads: int) -> Tensor:
    """By definition."""
    dim = qkv.shape[-1] // (heads + 2 * kv_heads)
    parts = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    q, k, v = (part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in parts)
    return (torch.softmax(q @ k.transpose(-2, -1) * dim**-0.5, -1) @ v).transpose(1, 2).flatten(2)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "rows apart":
        return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]
    return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "transposed" else x


def values() -> dict[str, float]:
    """Largest errors of output and gradient over the largest value."""
    errors = {}
    for name, dtype in TYPES.items():
        for shape in SHAPES:
            for layout in LAYOUTS if dtype == torch.float64 else LAYOUTS[:1]:
                blocks, tokens, heads, kv_heads, dim = shape
                torch.manual_seed(0)
                # Logits of up to 20 and more: softmax needs its maximum taken away.
                drawn = 2 * torch.randn(blocks, tokens, (heads + 2 * kv_heads) * dim)
                qkv = laid_out(drawn.to(dtype), layout).requires_grad_()
                above = laid_out(torch.randn(blocks, tokens, heads * dim).to(dtype), layout)
                plain = qkv.detach().double().requires_grad_()
                out, wanted = block_attention(qkv, heads, kv_heads), attention(plain, heads, kv_heads)
                pairs = [(out, wanted)]
                pairs += zip(
                    torch.autograd.grad(out, qkv, above),
                    torch.autograd.grad(wanted, plain, above.double()),
                    strict=True,
                )
                errors[f"{name} {shape} {layout}"] = max(
                    float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs
                )
    return errors


def models(**options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Two NesTs of the same weights: with PyTorch's attention and with the kernels."""
    torch.manual_seed(0)
    plain = create_model("nest_micro", **SMALL, **options)
    ours = create_model("nest_micro", **SMALL, **options, kernels="triton")
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def whole_model(attention: str) -> float:
    """The largest error of logits and gradients of a NesT in float64."""
    images, labels = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 4])
    found = []
    for model in models(attention=attention):
        logits = model.double()(images)
        F.cross_entropy(logits, labels).backward()
        found.append([logits.detach(), *(param.grad for param in model.parameters())])
    pairs = zip(found[1], found[0], strict=True)
    # Never NaN, which max passes over.
    return max(float(((a - b).abs().max() / b.abs().max()).nan_to_num(nan=torch.inf)) for a, b in pairs)


def compiled() -> float:
    """The largest error of the gradients through torch.compile, in one graph."""
    _, model = models(attention="mqa")
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = []
    for run in (model.double(), torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(images).square().sum().backward()
        found.append(torch.cat([param.grad.flatten() for param in model.parameters()]))
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())


def main() -> None:
    add_bfloat16()
    qkv = torch.randn(3, 16, 5 * 16, dtype=torch.float64, requires_grad=True)
    checked = torch.library.opcheck(torch.ops.rookery.block_attention.default, (qkv, 3, 1))
    nothing = block_attention(torch.zeros(0, 16, 5 * 16), 3, 1)
    print(
        json.dumps(
            {
                "values": values(),
                "operator": checked,
                "nothing": list(nothing.shape),
                "models": {attention: whole_model(attention) for attention in ("mha", "mqa")},
                "compiled": compiled(),
            }
        )
    )


if __name__ == "__main__":
    main()
