"""Attention over short sequences by this package's kernels: what they compute, and that they can be compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.models import ModelError, create_model
from pipeline.models.short_attention import short_attention
from tests.models.block_attention_cases import LAYOUTS, TYPES, attention
from tests.models.fused_mlp_cases import errors
from tests.models.run_cases import ROOT, found_by
from tests.models.short_attention_cases import DIM, MODELS, SHAPES
from tests.models.test_block_attention import resources

# Half precision rounds logits of 20 by up to 0.06, whoever computes with them.
ALLOWED = {"float64": 5e-14, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
VALUES = [f"float64 {shape} {layout}" for shape in SHAPES for layout in LAYOUTS]
VALUES += [f"{name} {shape} contiguous" for name in TYPES if name != "float64" for shape in SHAPES]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the interpreted kernels gave."""
    return found_by("short_attention_cases")


@pytest.mark.parametrize("case", VALUES)
def test_output_and_gradients(case: str, found: dict[str, Any]) -> None:
    assert found["values"].keys() == set(VALUES)
    assert found["values"][case] < ALLOWED[case.split()[0]]


def test_the_operators_are_sound(found: dict[str, Any]) -> None:
    """Their schemas and shapes without values; a batch of nothing."""
    assert len(found["operators"]) == 2
    assert {said for checked in found["operators"] for said in checked.values()} == {"SUCCESS"}
    assert found["nothing"] == [0, 9, 32]


def test_models_compute_the_same(found: dict[str, Any]) -> None:
    """Logits and gradients; compiled, and with layers that the backward pass computes again. Every layer has them."""
    differences = found["models"]
    assert differences.pop("nest_micro tokens") == 2 * 36 and differences.pop("hvt_ti_1 tokens") == 25 + 12
    assert len(differences) == 5 and max(differences.values()) < 1e-12


def test_training(found: dict[str, Any]) -> None:
    """In float32 the same; in bfloat16 as near to it as PyTorch's operations are: both round, each in its own way."""
    exact, ours = found["training"]
    assert len(ours) == 50 and ours == pytest.approx(exact, abs=1e-3)
    assert exact[-1] < 0.5 * exact[0]
    theirs, rounded = (torch.tensor(losses) - torch.tensor(exact) for losses in found["bfloat16"])
    assert len(rounded) == 50 and 0 < float(theirs.abs().max()) < 5e-3
    assert float(rounded.abs().max()) < 5e-3


@pytest.mark.parametrize("name", list(MODELS))
def test_dropout_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"no dropout of attention weights: attn_drop_rate=0\.1, set it to 0"):
        create_model(name, kernels="triton", attn_drop_rate=0.1, **MODELS[name])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("tokens", "dim"), [(196, 32), (144, 32), (196, 64), (97, 64)])
def test_they_compile(capability: int, tokens: int, dim: int, tmp_path: Path) -> None:
    """For an A100 and an H100, which takes none of them: in bfloat16 on tensor cores, with nothing spilled but, on an
    A100, for 196 tokens of heads of 64 channels."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.models import short_kernel

    for kernel in (short_kernel.forward_kernel, short_kernel.backward_kernel):
        queries, how = short_kernel.options(kernel, tokens, dim, capability == 90)
        constants = short_kernel.settings(tokens, dim, 6, 6, torch.bfloat16) | {"BQ": queries}
        types = {name: "constexpr" if name in constants else "*bf16" for name in kernel.arg_names}
        types |= {"sums": "*fp32"} if "sums" in types else {}
        pointers = [i for i, name in enumerate(kernel.arg_names) if types[name][0] == "*"]
        made = triton.compile(
            ASTSource(
                kernel,
                types,
                constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
                attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
            ),
            target=GPUTarget("cuda", capability, 32),
            options=how,
        )
        registers, spilled = resources(made.asm["cubin"], tmp_path)
        print(f"{kernel.__name__} sm_{capability} {tokens} x {dim}: {registers} registers, {spilled} bytes spilled")
        assert spilled <= (128 if (capability, tokens, dim) == (80, 196, 64) else 0)
        assert "mma" in made.asm["ptx"]
        assert made.metadata.shared <= 160 * 1024  # of a processor of an A100


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "allowed"), [("float16", 5e-3), ("bfloat16", 0.04)])
@pytest.mark.parametrize("shape", [*SHAPES, (257, 196, 12, 12, 32), (64, 49, 6, 6, 64)])
def test_on_a_gpu(shape: tuple[int, ...], name: str, allowed: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    sequences, tokens, heads, kv_heads, dim = shape
    width, dtype = (heads + 2 * kv_heads) * dim, getattr(torch, name)
    drawn = torch.randn(sequences, tokens, DIM), 0.5 * torch.randn(width, DIM), torch.randn(width)
    given = [t.to("cuda", dtype).requires_grad_() for t in drawn]
    exact = [t.detach().double().requires_grad_() for t in given]
    above = torch.randn(sequences, tokens, heads * dim, device="cuda", dtype=dtype)
    out, wanted = short_attention(*given, heads, kv_heads), attention(F.linear(*exact), heads, kv_heads)
    grads = torch.autograd.grad(out, given, above), torch.autograd.grad(wanted, exact, above.double())
    assert errors([out.detach(), *grads[0]], [wanted.detach(), *grads[1]]) < allowed


def test_instructions_are_as_written() -> None:
    """docs/performance.md says what they cost, for this release of Triton."""
    from bench.instructions_nest import count

    written = json.loads((ROOT / "bench/results/instructions_nest.json").read_text())["models"][0]
    assert count("nest_tiny", 90)["millions"] == pytest.approx(written["millions"], rel=0.1)
