"""Residual sums and their LayerNorm in one pass: what the kernels compute, and that they can be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.block_attention_cases import TYPES
from tests.models.run_cases import found_by
from tests.models.sum_norm_cases import FORMS, LAYOUTS, SHAPES, value
from tests.models.test_block_attention import resources

ALLOWED = {"float64": 5e-15, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
VALUES = [f"float64 {shape} {form} {layout}" for shape in SHAPES for form in FORMS for layout in LAYOUTS]
VALUES += [f"{n} {s} {form} contiguous" for n in TYPES if n != "float64" for s in SHAPES[:2] for form in FORMS]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the interpreted kernels gave."""
    return found_by("sum_norm_cases")


@pytest.mark.parametrize("case", VALUES)
def test_results_and_gradients(case: str, found: dict[str, Any]) -> None:
    assert found["values"].keys() == set(VALUES)
    assert found["values"][case] < ALLOWED[case.split()[0]]


def test_types(found: dict[str, Any]) -> None:
    """Under autocast the sum stays in float32, and its LayerNorm is of the type that the next product takes."""
    results, gradients = ["float32", "bfloat16"], ["float32", "bfloat16", "float32", "float32"]
    assert found["types"] == [f"torch.{name}" for name in results + gradients]


def test_the_operators_are_sound(found: dict[str, Any]) -> None:
    """Their schemas and shapes without values; a batch of nothing, of which the gradient of a weight is 0."""
    assert len(found["operators"]) == 6
    assert {said for checked in found["operators"].values() for said in checked.values()} == {"SUCCESS"}
    assert found["nothing"] == [[0, 3, 8], [0, 3, 8], [0.0] * 8]


@pytest.mark.parametrize(("count", "programs"), [(1, 1), (16, 1), (17, 2), (16 * 1024, 1024), (200704, 965)])
def test_the_share_of_a_program(count: int, programs: int) -> None:
    """All rows are taken, by no program that has none."""
    from pipeline.models.sum_norm_kernel import share

    tiles, found = share(count, 16)
    assert found == programs
    assert (found - 1) * tiles * 16 < count <= found * tiles * 16


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dim", [96, 192, 384, 420, 512])
def test_they_compile(capability: int, dim: int, tmp_path: Path) -> None:
    """For an A100 and an H100, which takes neither: with nothing spilled, rows read 16 bytes at a time, and backward
    with room for three programs on a processor."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.models import sum_norm_kernel as kernels

    half = {"branch", "normed", "grad_normed", "grad_branch"}
    for kernel, most in ((kernels.forward_kernel, 64), (kernels.backward_kernel, 168)):
        constants = kernels.settings(dim, torch.float32) | {"TIMES": 1.0, "EPS": 1e-6}
        constants |= {"ADDS": True, "BIASED": True, "SCALED": True, "NORMS": True}
        types = {name: "constexpr" if name in constants else "*fp32" for name in kernel.arg_names}
        types |= dict.fromkeys(half & types.keys(), "*bf16")
        types |= {name: "i32" for name in ("count", "samples", "tiles") if name in types}
        pointers = [i for i, name in enumerate(kernel.arg_names) if types[name][0] == "*"]
        made = triton.compile(
            ASTSource(
                kernel,
                types,
                constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
                attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
            ),
            target=GPUTarget("cuda", capability, 32),
            options=kernels.OPTIONS,
        )
        registers, spilled = resources(made.asm["cubin"], tmp_path)
        assert not spilled and registers <= most
        assert made.asm["ptx"].count("ld.global.v4") >= 6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("shape", [*SHAPES[::2], (64, 197, 384), (7, 3136, 96)])
@pytest.mark.parametrize("form", FORMS[::2])
def test_on_a_gpu(shape: tuple[int, int, int], kind: str, form: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # Sums of many rows, in float32.
    allowed = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.02}
    assert value(form, shape, kind, LAYOUTS[0], "cuda") < allowed[kind]
