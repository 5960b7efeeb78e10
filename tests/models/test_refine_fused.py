"""Refiner's maps by this package's kernels: what they compute, that they can be compiled, and what they refuse."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.models import ModelError, create_model
from pipeline.models.kernels import asked_for, runs_here
from pipeline.models.layers import Mlp
from pipeline.models.refine_maps import OfficialRefiner
from tests.models.refine_fused_cases import CASES, apart, differences, half_precision, worst
from tests.models.refiner_step import some_maps, step, with_weights
from tests.models.test_block_attention import resources

ROOT = Path(__file__).parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# Heads and expanded maps of Refiner-S and -M, of -L, and some that fill nothing.
SIZES = {"refiner_vit_s": (12, 36), "refiner_vit_l": (16, 48), "odd": (17, 34)}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the interpreted kernels gave."""
    command = [sys.executable, "-m", "tests.models.refine_fused_cases"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_small(ours: dict[str, float], plain: dict[str, float], dtype: str) -> None:
    # A sum of rounded numbers is no better than these: measured against PyTorch's in the same type.
    allowed = 1e-11 if dtype == "float64" else max(2e-5, 2 * worst(plain, running=False))
    assert worst(ours, running=False) < allowed, ours
    assert worst(ours, running=True) < 1e-6, ours


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_training(name: str, found: dict[str, Any]) -> None:
    """Refined maps, gradients of maps and parameters, running statistics."""
    assert found["values"].keys() == CASES.keys()
    assert_small(*found["values"][name], CASES[name].dtype)


def assert_no_worse(errors: dict[str, dict[str, float]]) -> None:
    for name in ("out", "maps"):
        assert errors["fused"][name] < errors["plain"][name] + 1e-3, errors
    assert all(error < 1.5 * errors["plain"][name] + 1e-3 for name, error in errors["fused"].items()), errors


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_no_worse_than_the_plain_path(name: str, found: dict[str, Any]) -> None:
    assert_no_worse(found["half"][name])


def test_models_compute_the_same(found: dict[str, Any]) -> None:
    assert found["model"] < 1e-9
    plain, ours = found["training"]
    assert len(ours) == 15 and ours == pytest.approx(plain, abs=1e-3)
    assert plain[-1] < 0.8 * plain[0]


def test_training_in_bfloat16(found: dict[str, Any]) -> None:
    """About as far from float32 as PyTorch's operations are, which round the maps elsewhere."""
    exact = torch.tensor(found["training"][0])
    plain, ours = (torch.tensor(losses) - exact for losses in found["bfloat16"])
    assert len(ours) == 15 and 0 < float(plain.abs().max()) < 0.02
    assert float(ours.abs().max()) < 0.02


def test_a_group_gives_the_same_bits_alone(found: dict[str, Any]) -> None:
    """How many groups go through the kernels together depends on their size, and must not show."""
    assert found["apart"] == {"out": 0, "maps": 0}


def test_the_operator_is_sound(found: dict[str, Any]) -> None:
    """Its schema, its shapes without values, its gradient as compilers trace it, and what it keeps."""
    assert found["operator"] and set(found["operator"].values()) == {"SUCCESS"}
    assert found["compiled"] < 1e-12
    assert found["kept"] == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kernel": 7}, "kernels=triton has local kernels of side 1, 3, 5, not refine.kernel=7"),
        ({"embed_dim": 330, "num_heads": 33}, "kernels=triton refines at most 32 maps, this layer has 33"),
        ({"kernels": "cuda"}, "kernels='cuda' is not one of 'torch', 'triton'"),
    ],
)
def test_what_they_can_not_do_is_said(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError) as caught, torch.device("meta"):
        create_model("refiner_vit_s", **{"kernels": "triton", "depth": 2, **options})
    assert expected in str(caught.value)


def test_the_linear_form_has_none() -> None:
    """Asked for its maps alone that is a mistake; a Refiner of it takes those that it has, for its MLPs."""
    refine = {"flavour": "linear", "kernels": "triton"}
    with pytest.raises(ModelError, match="kernels=triton refines by flavour=official, not linear"):
        create_model("nest_micro", refine=refine)
    with torch.device("meta"):
        model = create_model("refiner_vit_s", kernels="triton", depth=2, flavour="linear")
    assert {m.fused for m in model.modules() if isinstance(m, Mlp)} == {True}
    assert not any(isinstance(m, OfficialRefiner) for m in model.modules())


def test_on_a_cpu_nothing_changes() -> None:
    plain = with_weights(OfficialRefiner(3, 3, 3, 0.176)).train()
    fused = copy.deepcopy(plain)
    fused.fused = True
    maps = some_maps(2, 3, 5, 5).float()
    assert not runs_here(maps)
    got, wanted = step(fused, maps, None, None), step(plain, maps, None, None)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_whether_options_ask_for_them() -> None:
    assert asked_for({"kernels": "triton"}) and asked_for({"refine": {"kernels": "triton"}, "depth": 2})
    assert not asked_for({}) and not asked_for({"kernels": "torch", "refine": None, "depth": 2})


def test_other_architectures_have_them_too() -> None:
    """Every one that refines maps has them by its option `refine`."""
    with torch.device("meta"):
        model = create_model("hvt_ti_1", refine={"flavour": "official", "kernels": "triton"})
    refiners = [module for module in model.modules() if isinstance(module, OfficialRefiner)]
    assert refiners and all(refiner.fused for refiner in refiners)


@pytest.mark.parametrize(
    ("model", "dtype", "capability"),
    [
        ("refiner_vit_s", "bf16", 80),
        ("refiner_vit_s", "bf16", 90),
        ("odd", "fp16", 80),
        ("refiner_vit_s", "fp32", 80),
        ("refiner_vit_l", "bf16", 90),
    ],
)
def test_they_compile(model: str, dtype: str, capability: int, tmp_path: Path) -> None:
    """For an A100 and an H100, which takes none of them: in half precision on tensor cores, with nothing spilled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.models import refine_calls

    heads, hidden = SIZES[model]
    size = refine_calls.Size(heads, hidden, 3, DTYPES[dtype], 1e-5, 0.125)
    of_maps = {"maps", "convolved", "reduced", "out", "grad", "grad_second", "grad_maps", "weights", "mixed"}
    integers = ("samples", "rows", "columns", "run", "plane", "parts", "count", "size")
    given = {"STORE": True, "SUM": True, "PAIRS": True, "COUNT": heads, "C": 32}
    for kernel in refine_calls.KERNELS:
        constants = size.constants(kernel) | {name: given[name] for name in given if name in kernel.arg_names}
        names = dict.fromkeys(integers, "i32")
        names |= dict.fromkeys(of_maps, f"*{dtype}") | dict.fromkeys(constants, "constexpr")
        sums = "*fp64" if dtype == "fp64" else "*fp32"
        types = {name: names.get(name, sums) for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        made = triton.compile(
            ASTSource(kernel, types, constexprs=places, attrs=aligned),
            target=GPUTarget("cuda", capability, 32),
            options=size.options(kernel),
        )
        registers, spilled = resources(made.asm["cubin"], tmp_path)
        print(
            f"{kernel.__name__} sm_{capability} {dtype} {heads} heads: {registers} registers, {spilled} bytes spilled"
        )
        # What lies between the others has one program for each group, so that some bytes of it count for nothing.
        small = "refine_kernel_between" in kernel.fn.__module__
        assert not spilled or small or dtype == "fp32" or model == "odd"
        if "P" in constants or "WIDTH" in constants:
            assert ("mma" in made.asm["ptx"]) == (dtype != "fp32")
        assert made.metadata.shared <= 160 * 1024  # of a processor of an A100


def test_instructions_are_as_written() -> None:
    """What docs/performance.md says of them, counted again."""
    from bench.instructions import count

    written = json.loads((ROOT / "bench/results/instructions.json").read_text())["models"][0]
    counted = count(written["model"], 90)
    assert counted["millions"] == pytest.approx(written["millions"], rel=0.1, abs=0.05)
    assert counted["microseconds_an_image"] == pytest.approx(written["microseconds_an_image"], rel=0.1)


@contextmanager
def no_tf32() -> Iterator[None]:
    """By hand: monkeypatch would delete what it set, since torch keeps these switches in no dictionary."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with no_tf32():
        assert_small(*differences(CASES[name]._replace(dtype=dtype), "cuda"), dtype)


@pytest.mark.gpu
def test_a_group_gives_the_same_bits_alone_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert apart("cuda") == {"out": 0, "maps": 0}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu(dtype: torch.dtype) -> None:
    """No worse than PyTorch's operations there, and the same bits each time, at the size of Refiner-S."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert_no_worse(half_precision(dtype, "cuda"))
    refiner = with_weights(OfficialRefiner(12, 3, 3, 0.176)).cuda().train()
    refiner.fused = True
    maps = some_maps(8, 12, 197, 197).cuda().to(dtype)
    steps = []
    for _ in range(2):
        refiner.zero_grad()
        with torch.autocast("cuda", dtype):
            left = step(copy.deepcopy(refiner), maps, None, None)
        steps.append(left)
    assert all(torch.equal(steps[0][name], value) for name, value in steps[1].items())
