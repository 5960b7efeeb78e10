"""Attention inside of small blocks by this package's kernels: what they compute, and that they can be compiled."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pipeline.models.block_attention as block_attention_module
from pipeline.models import ModelError, create_model
from pipeline.models.block_attention import block_attention
from pipeline.models.kernels import runs_here
from tests.models.block_attention_cases import LAYOUTS, SHAPES, TYPES, attention
from tests.models.run_cases import found_by

ROOT = Path(__file__).parents[2]
ALLOWED = {"float64": 1e-14, "float32": 2e-6, "float16": 2e-3, "bfloat16": 8e-3}
VALUES = [f"{name} {s} {layout}" for name in TYPES for s in SHAPES for layout in LAYOUTS if name == "float64"]
VALUES += [f"{name} {s} contiguous" for name in ("float32", "float16", "bfloat16") for s in SHAPES]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the interpreted kernels gave."""
    return found_by("block_attention_cases")


@pytest.mark.parametrize("case", VALUES)
def test_output_and_gradient(case: str, found: dict[str, Any]) -> None:
    assert found["values"].keys() == set(VALUES)
    assert found["values"][case] < ALLOWED[case.split()[0]]


def test_the_operator_is_sound(found: dict[str, Any]) -> None:
    """Its schema, its shapes without values, and its gradient as compilers trace it; a batch of nothing."""
    assert found["operator"] and set(found["operator"].values()) == {"SUCCESS"}
    assert found["nothing"] == [0, 16, 48]
    assert found["compiled"] < 1e-13


def test_models_compute_the_same(found: dict[str, Any]) -> None:
    assert set(found["models"]) == {"mha", "mqa"} and max(found["models"].values()) < 1e-11


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"embed_dims": (24, 64, 96)}, "for heads of 16, 32, 64, 128 channels, these have 24"),
        ({"attn_drop_rate": 0.1}, "no dropout of attention weights: attn_drop_rate=0.1"),
        ({"kernels": "cuda"}, "kernels='cuda' is not one of 'torch', 'triton'"),
    ],
)
def test_what_they_can_not_do_is_said(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        create_model("nest_micro", **{"kernels": "triton", **options})
    assert expected in str(caught.value)


def test_a_gpu_without_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def launched(*_: object) -> None:
        raise OutOfResources(327680, 232448, "shared memory")

    monkeypatch.setattr(block_attention_module, "triton_module", lambda name: SimpleNamespace(forward=launched))
    with pytest.raises(ModelError, match=r"too large for this GPU in float64 .*327680.* train in half precision"):
        block_attention(torch.zeros(1, 16, 48, dtype=torch.float64), 1, 1)


def test_on_a_cpu_nothing_changes() -> None:
    images = torch.randn(2, 3, 16, 16)
    assert not runs_here(images)
    torch.manual_seed(0)
    plain = create_model("nest_micro").eval()
    ours = create_model("nest_micro", kernels="triton").eval()
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours(images), plain(images))


def resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes that it keeps in memory for want of them."""
    import triton

    (folder / "kernel.cubin").write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", folder / "kernel.cubin"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"{what}:(\d+)", told) for what in ("REG", "STACK", "LOCAL"))
    assert registers and stack and local, told
    return int(registers[1]), int(stack[1]) + int(local[1])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize(("tokens", "dim", "heads", "kv_heads"), [(16, 64, 12, 1), (64, 32, 2, 2)])
def test_they_compile(
    capability: int, dtype: str, tokens: int, dim: int, heads: int, kv_heads: int, tmp_path: Path
) -> None:
    """For an A100 and an H100, which takes none of them: in half precision on tensor cores, with nothing spilled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.models import block_kernel

    of_torch = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}[dtype]
    constants = block_kernel.settings(tokens, dim, heads, kv_heads, of_torch)
    for kernel in (block_kernel._forward_kernel, block_kernel._backward_kernel):
        types = {name: "constexpr" if name in constants else f"*{dtype}" for name in kernel.arg_names}
        types |= {"row": "i32", "block": "i32", "blocks": "i32"}
        # As they are launched: rows and blocks of these widths are.
        aligned = {"row", "block"} | {name for name, kind in types.items() if kind[0] == "*"}
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned & types.keys()}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        made = triton.compile(
            ASTSource(kernel, types, constexprs=places, attrs=attributes),
            target=GPUTarget("cuda", capability, 32),
            options=block_kernel.options(tokens, of_torch),
        )
        registers, spilled = resources(made.asm["cubin"], tmp_path)
        print(f"{kernel.__name__} sm_{capability} {dtype} {tokens} x {dim}, {heads} heads: {registers} registers")
        assert not spilled or dtype in ("fp32", "fp64")
        assert ("mma" in made.asm["ptx"]) == (dtype != "fp32")
        assert made.metadata.shared <= 160 * 1024  # of a processor of an A100


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "allowed"), [("float64", 1e-13), ("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu(shape: tuple[int, ...], name: str, allowed: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    blocks, tokens, heads, kv_heads, dim = shape
    qkv = torch.randn(blocks, tokens, (heads + 2 * kv_heads) * dim, device="cuda", dtype=getattr(torch, name))
    above = torch.randn(blocks, tokens, heads * dim, device="cuda", dtype=qkv.dtype)
    plain = qkv.double().requires_grad_()
    out, wanted = block_attention(qkv.requires_grad_(), heads, kv_heads), attention(plain, heads, kv_heads)
    (grad,), (wanted_grad,) = torch.autograd.grad(out, qkv, above), torch.autograd.grad(wanted, plain, above.double())
    for ours, theirs in ((out, wanted), (grad, wanted_grad)):
        assert float((ours - theirs).detach().abs().max() / theirs.detach().abs().max()) < allowed
