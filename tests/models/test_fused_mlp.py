"""MLPs whose GELU is a part of the products beside it: what the kernels compute, and that they can be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.models import ModelError, create_model
from pipeline.models.fused_mlp import fused_mlp
from pipeline.models.kernels import runs_here
from tests.models.block_attention_cases import TYPES
from tests.models.fused_mlp_cases import FORMS, LAYOUTS, SHAPES, SMALL, errors, plain
from tests.models.run_cases import found_by
from tests.models.test_block_attention import resources

ALLOWED = {"float64": 1e-14, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
VALUES = [f"float64 {shape} {form} {layout}" for shape in SHAPES for form in FORMS for layout in LAYOUTS]
VALUES += [f"{n} {s} {form} contiguous" for n in TYPES if n != "float64" for s in SHAPES[::2] for form in FORMS]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the interpreted kernels gave."""
    return found_by("fused_mlp_cases")


@pytest.mark.parametrize("case", VALUES)
def test_output_and_gradients(case: str, found: dict[str, Any]) -> None:
    assert found["values"].keys() == set(VALUES)
    assert found["values"][case] < ALLOWED[case.split()[0]]


def test_the_operators_are_sound(found: dict[str, Any]) -> None:
    """Their schemas and shapes without values; a batch of nothing."""
    assert len(found["operators"]) == 4
    assert {said for checked in found["operators"].values() for said in checked.values()} == {"SUCCESS"}
    assert found["nothing"] == [2, 0, 8]


def test_models_compute_the_same(found: dict[str, Any]) -> None:
    """Logits and gradients; also compiled, and with layers that the backward pass computes again."""
    assert set(found["models"]) == {name + way for name in SMALL for way in ("", " compiled", " recomputed")}
    assert max(found["models"].values()) < 1e-12


def test_batches_of_all_sizes_share_a_program(found: dict[str, Any]) -> None:
    """Compiled for the first size, then for any: the last batch of an evaluation is none that was seen before."""
    assert found["programs"] == 2


def test_what_is_kept(found: dict[str, Any]) -> None:
    """Input, both weights (8 x 40 and 40 x 8), what goes into GELU, and what comes out unless it is computed again."""
    assert found["kept"] == {"": [8, 8, 40, 40, 40], "lean": [8, 8, 40, 40], "evaluated": []}


def test_frozen_weights_cost_no_product(found: dict[str, Any]) -> None:
    """Four of them a layer, of which an HVT here has two; the other gradients stay as they are."""
    whole, left = found["frozen"]["products"]
    assert whole - left == 8
    assert found["frozen"]["error"] < 1e-14 and found["frozen"]["compiled"] < 1e-14


def test_training(found: dict[str, Any]) -> None:
    """In float32 the same; in bfloat16 as near to it as PyTorch's operations are: both round, each in its own way."""
    exact, ours = found["training"]
    assert len(ours) == 50 and ours == pytest.approx(exact, abs=1e-3)
    assert exact[-1] < 0.7 * exact[0]
    theirs, rounded = (torch.tensor(losses) - torch.tensor(exact) for losses in found["bfloat16"])
    assert len(rounded) == 50 and 0 < float(theirs.abs().max()) < 5e-3
    assert float(rounded.abs().max()) < 5e-3


@pytest.mark.parametrize("name", ["nest_micro", "hvt_ti_1", "refiner_vit_s"])
def test_what_they_can_not_do_is_said(name: str) -> None:
    with pytest.raises(ModelError, match=r"no dropout in MLPs: drop_rate=0\.1, set it to 0"):
        create_model(name, kernels="triton", drop_rate=0.1)
    with pytest.raises(ModelError, match=r"kernels='cuda' is not one of 'torch', 'triton'"):
        create_model(name, kernels="cuda")


@pytest.mark.parametrize("name", list(SMALL))
def test_on_a_cpu_nothing_changes(name: str) -> None:
    made = []
    for kernels in ("torch", "triton"):
        torch.manual_seed(0)
        made.append(create_model(name, kernels=kernels, **SMALL[name]).eval())
    images = torch.randn(2, 3, made[0].img_size, made[0].img_size)
    assert not runs_here(images) and torch.equal(made[0](images), made[1](images))


# Of NesT-T and B, DeiT-S and Refiner-M, whose width no tile fits.
SIZES = [(96, 384), (512, 2048), (384, 1536), (420, 1260)]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "sizes"), [*(("bf16", s) for s in SIZES), *((t, SIZES[0]) for t in ("fp16", "fp32"))]
)
def test_they_compile(capability: int, dtype: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    """For an A100 and an H100, which takes none of them: in half precision with products on tensor cores and nothing
    spilled, and where it counts with room for two programs on a processor."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.models import mlp_kernel

    dim, hidden = sizes
    of_torch = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    forward, backward = mlp_kernel.forward_kernel, mlp_kernel.backward_kernel
    for kernel, option in ((forward, {"KEEP": True}), (backward, {"AGAIN": False}), (backward, {"AGAIN": True})):
        constants = {"DIM": dim, "HIDDEN": hidden, "TANH": True, **option, **mlp_kernel.settings(dim, of_torch)}
        types = {name: "constexpr" if name in constants else f"*{dtype}" for name in kernel.arg_names}
        types |= {name: "*fp32" for name in ("bias", "sums") if name in types} | {"count": "i32"}
        pointers = [i for i, name in enumerate(kernel.arg_names) if types[name][0] == "*"]
        made = triton.compile(
            ASTSource(
                kernel,
                types,
                constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
                attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
            ),
            target=GPUTarget("cuda", capability, 32),
            options=mlp_kernel.options(of_torch),
        )
        registers, spilled = resources(made.asm["cubin"], tmp_path)
        print(f"{kernel.__name__} {option} sm_{capability} {dtype} {dim} x {hidden}: {registers} registers")
        assert not spilled
        if dtype != "fp32":
            assert "mma" in made.asm["ptx"] and (capability == 80 or "wgmma" in made.asm["ptx"])
            # Of an A100's processor 164 KiB, of an H100's 228, less 1 for each program; 65,536 registers.
            assert 2 * (made.metadata.shared + 1024) <= (164 if capability == 80 else 228) * 1024
            crowded = capability == 80 or option == {"AGAIN": True} or dim % 32
            assert crowded or 2 * registers * 256 <= 65536


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "allowed"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 384, 1536), (777, 420, 1260)])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(shape: tuple[int, int, int], name: str, allowed: float, form: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows, dim, hidden = shape
    dtype, tanh = getattr(torch, name), "tanh" in form
    drawn = torch.randn(rows, dim), torch.randn(hidden, dim) * dim**-0.5, torch.randn(hidden)
    drawn += torch.randn(dim, hidden) * hidden**-0.5, torch.randn(dim)
    given = [t.to("cuda", dtype).requires_grad_() for t in drawn]
    exact = [t.detach().double().requires_grad_() for t in given]
    above = torch.randn(rows, dim, device="cuda", dtype=dtype)
    out, wanted = fused_mlp(*given, tanh=tanh, lean="lean" in form), plain(*exact, tanh=tanh)
    grads = torch.autograd.grad(out, given, above), torch.autograd.grad(wanted, exact, above.double())
    assert errors([out.detach(), *grads[0]], [wanted.detach(), *grads[1]]) < allowed
