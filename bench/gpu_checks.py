"""The checks of bench/gpu.sh: fast paths against plain ones, on the GPU that the measurements are taken on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import create_model, fold_refiners, num_drop_paths, set_drop_path_noise, set_lean
from pipeline.models.batch_norm import group_statistics
from pipeline.models.block_attention import block_attention
from pipeline.models.fused_mlp import fused_mlp
from pipeline.models.refine_maps import OfficialRefiner
from pipeline.models.short_attention import short_attention
from pipeline.models.sum_norm import add_branch, sum_norm
from pipeline.models.timm_weights import from_timm

# How far what is got is from what is wanted.
Measure = Callable[[Sequence[Tensor], Sequence[Tensor]], float]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_paths(tiny: bool) -> Iterator[dict[str, Any]]:
    """Of those that everybody gets: a `row` for each."""
    _exact()
    nest, theirs, side = _nests(tiny)
    images = torch.randn(4, 3, side, side, device=DEVICE, generator=_seeded())
    with torch.inference_mode():
        yield row("NesT's logits are timm's, fp32", [nest(images)], [theirs(images)], 1e-4)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            yield row("NesT's logits are timm's, bf16", [nest(images).float()], [theirs(images).float()], 0.05)
        compiled: Callable[[Tensor], Tensor] = torch.compile(nest, backend="aot_eager" if tiny else "inductor")
        found = attempt("compiled NesT, fp32", lambda: ([compiled(images)], [nest(images)]), 1e-4)
        # What can't be compiled here is not wrong: parts that compile fail on their own, the others are measured.
        yield found | {"passed": found["passed"] or "allowed" not in found}
    for name in ("refiner_vit_s", "refiner_vit_s_linear"):
        model, images = _refiner(name, tiny)
        yield row(f"{name} that keeps few maps, fp64", _step(model, images, True), _step(model, images, False), 1e-6)
        model.eval()
        with torch.inference_mode():
            yield row(f"{name} folded, fp64", [fold_refiners(model)(images)], [model(images)], 1e-9)


def kernels(tiny: bool) -> Iterator[dict[str, Any]]:
    """The same of the opt-in kernels, which run on a GPU alone."""
    if DEVICE.type == "cpu":
        return
    _exact()
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        for shape in ((37, 16, 3, 1, 64), (5, 64, 4, 4, 32)):
            yield attempt(f"attention in blocks {shape}, {dtype}", partial(_block_attention, shape, dtype), allowed)
    for shape in ((5, 196, 3, 3, 32), (9, 97, 6, 6, 64), (3, 49, 4, 1, 64)):
        named = f"attention over short sequences {shape}, {torch.bfloat16}"
        yield attempt(named, partial(_short_attention, shape, torch.bfloat16), 0.04)
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        for sizes in ((1000, 96, 384), (777, 420, 1260)):
            for tanh, lean in ((True, False), (False, True)):
                named = f"MLP {sizes}, {'tanh' if tanh else 'erf'}{', lean' if lean else ''}, {dtype}"
                yield attempt(named, partial(_mlp, sizes, tanh, lean, dtype), allowed)
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        for shape in ((5, 196, 96), (3, 50, 420)):
            named = f"residual sum and its LayerNorm {shape}, {dtype}"
            yield attempt(named, partial(_sum_norm, shape, dtype), allowed)
    for name in ("nest_tiny", "hvt_ti_1"):
        # As far from float32 as PyTorch's operations, or twice as far.
        lean = 2 * overall(*_in_bf16(name, "torch"))
        yield attempt(f"{name} by kernels, bf16", partial(_in_bf16, name, "triton"), lean, overall)
    for dtype, allowed in ((torch.float64, 1e-9), (torch.float32, 5e-3), (torch.bfloat16, 0.05)):
        for shape in ((3, 12, 197, 3), (6, 16, 50, 2)):
            # Rounding moves a pixel past a bend of ReLU6 here and there, whoever computes: its gradient is another one,
            # which says nothing. So of all pixels together, and in half precision by what PyTorch's operations give.
            lean = 0.0
            if dtype == torch.bfloat16:
                lean = 2 * overall(*_refined(shape, dtype, fused=False))
            refined = partial(_refined, shape, dtype, fused=True)
            yield attempt(f"refined maps {shape}, {dtype}", refined, max(allowed, lean), overall)
    yield attempt("refiner_vit_s by kernels, fp64", partial(_refiner_by_kernels, tiny), 1e-6)


def row(
    name: str, got: Sequence[Tensor], wanted: Sequence[Tensor], allowed: float, measure: Measure | None = None
) -> dict[str, Any]:
    """A check: its difference, by `worst` if nothing else, what is allowed, whether it passed."""
    error = (measure or worst)(got, wanted)
    # What is allowed may be another path's error, and that be infinite.
    return {"name": name, "error": error, "allowed": allowed, "passed": math.isfinite(error) and error <= allowed}


def attempt(
    name: str,
    both: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
    allowed: float,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """`row` of what is got and wanted; an exception, such as a compiler's, is a check that failed."""
    try:
        return row(name, *both(), allowed, measure)
    except Exception as error:
        return {"name": name, "error": repr(error)[:500], "passed": False}


def worst(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference over the largest value wanted, of all; infinite if any is no number."""
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True)]
    # Python's max passes over a NaN.
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def overall(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """As `worst`, of the length of the difference over that of what is wanted."""
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _block_attention(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradient of the kernels for (blocks, tokens, heads, keys, channels), and of PyTorch in float64."""
    blocks, tokens, heads, kv_heads, dim = shape
    qkv = torch.randn(blocks, tokens, (heads + 2 * kv_heads) * dim, device=DEVICE, generator=_seeded()).to(dtype)
    above = torch.randn(blocks, tokens, heads * dim, device=DEVICE, generator=_seeded()).to(dtype)
    ours, plain = qkv.requires_grad_(), qkv.detach().double().requires_grad_()
    out, expected = block_attention(ours, heads, kv_heads), _attention(plain, heads, kv_heads, dim)
    got = [out, *torch.autograd.grad(out, ours, above)]
    return [t.detach().double() for t in got], [
        expected.detach(),
        *torch.autograd.grad(expected, plain, above.double()),
    ]


def _attention(qkv: Tensor, heads: int, kv_heads: int, dim: int) -> Tensor:
    """By definition."""
    widths = [heads * dim, kv_heads * dim, kv_heads * dim]
    q, k, v = (part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in qkv.split(widths, -1))
    maps = torch.softmax(q @ k.transpose(-2, -1) * dim**-0.5, -1)
    return (maps @ v).transpose(1, 2).flatten(2)


def _short_attention(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """As `_block_attention`, with the projection before it, of 96 channels."""
    sequences, tokens, heads, kv_heads, dim = shape
    width = (heads + 2 * kv_heads) * dim
    drawn = _drawn(dtype, (sequences, tokens, 96), (width, 96), (width,), scales=(1.0, 0.2, 1.0))
    above = torch.randn(sequences, tokens, heads * dim, device=DEVICE, generator=_seeded()).to(dtype)
    return _both(
        drawn,
        lambda x, weight, bias: short_attention(x, weight, bias, heads, kv_heads),
        lambda x, weight, bias: _attention(F.linear(x, weight, bias), heads, kv_heads, dim),
        above,
    )


def _mlp(sizes: tuple[int, int, int], tanh: bool, lean: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Of `fused_mlp` for (rows, channels, hidden channels), and of PyTorch in float64."""
    rows, dim, hidden = sizes
    shapes = (rows, dim), (hidden, dim), (hidden,), (dim, hidden), (dim,)
    drawn = _drawn(dtype, *shapes, scales=(1.0, dim**-0.5, 1.0, hidden**-0.5, 1.0))
    above = torch.randn(rows, dim, device=DEVICE, generator=_seeded()).to(dtype)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        active = F.gelu(F.linear(x, weight, bias), approximate="tanh" if tanh else "none")
        return F.linear(active, weight2, bias2)

    return _both(drawn, partial(fused_mlp, tanh=tanh, lean=lean), plain, above)


def _sum_norm(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Of `sum_norm` and `add_branch` in turn for (samples, tokens, channels), and of PyTorch in float64."""
    dim = shape[-1]
    drawn = _drawn(dtype, shape, shape, (dim,), (dim,), (dim,), scales=(2.0, 1.0, 1.0, 1.0, 1.0))
    scale = torch.rand(shape[0], device=DEVICE, generator=_seeded())
    above = torch.randn(shape, device=DEVICE, generator=_seeded()).to(dtype)

    def fused(x: Tensor, branch: Tensor, bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        norm: Any = SimpleNamespace(weight=weight, bias=shift, eps=1e-6)
        total, normed = sum_norm(x, norm, branch, bias, scale.to(x.dtype), 2.0)
        return add_branch(total, normed, bias, None)

    def plain(x: Tensor, branch: Tensor, bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        total = x + 2 * scale[:, None, None].to(dtype).double() * (branch + bias)
        return total + F.layer_norm(total, (dim,), weight, shift, 1e-6) + bias

    return _both(drawn, fused, plain, above)


def _drawn(dtype: torch.dtype, *shapes: tuple[int, ...], scales: Sequence[float]) -> list[Tensor]:
    generator = _seeded()
    return [
        (scale * torch.randn(shape, device=DEVICE, generator=generator)).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def _both(
    given: Sequence[Tensor], ours: Callable[..., Tensor], plain: Callable[..., Tensor], above: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of ours, and of the plain one in float64."""
    found = []
    for compute, wide in ((ours, False), (plain, True)):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in given]
        out = compute(*leaves)
        grads = torch.autograd.grad(out, leaves, above.to(out.dtype))
        found.append([t.detach().double() for t in (out, *grads)])
    return found[0], found[1]


def _in_bf16(name: str, kernels: str) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and gradients of a model in bf16, and in float32 without kernels."""
    found = []
    for way, half in ((kernels, True), ("torch", False)):
        torch.manual_seed(0)
        model = create_model(name, drop_path_rate=0.0, kernels=way).to(DEVICE).train()
        images = torch.randn(4, 3, model.img_size, model.img_size, device=DEVICE, generator=_seeded())
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            logits = model(images).float()
        F.cross_entropy(logits, torch.arange(4, device=DEVICE)).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append([logits.detach(), gradients])
    return found[0], found[1]


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


def _refiner(name: str, tiny: bool) -> tuple[Any, Tensor]:
    """A model and pictures for it, in float64."""
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48} if tiny else {}
    torch.manual_seed(0)
    model = create_model(name, drop_path_rate=0.1, **sizes).to(DEVICE, torch.float64)
    images = torch.randn(4, 3, model.img_size, model.img_size, device=DEVICE, generator=_seeded()).double()
    return model, images


def _refiner_by_kernels(tiny: bool) -> tuple[list[Tensor], list[Tensor]]:
    model, images = _refiner("refiner_vit_s", tiny)
    plain = _step(model, images, False)
    for module in model.modules():
        if isinstance(module, OfficialRefiner):
            module.fused = True
    return _step(model, images, False), plain


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


def _exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def _seeded() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(1)
