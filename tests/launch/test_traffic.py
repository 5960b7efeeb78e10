"""What docs/performance.md says of a step's traffic: the count against one by hand, and a part of it counted again."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.launch.traffic_cases import ROWS
from tests.train.commands import ROOT, environment

HALF, SINGLE = 2, 4
FLOPS = 2 * ROWS * (2 * 64 * 128 + 3 * 128 * 32)  # the input needs no gradient


@pytest.fixture(scope="module")
def found(idle: dict[str, str]) -> Any:
    command = [sys.executable, "-m", "tests.launch.traffic_cases"]
    done = subprocess.run(command, cwd=ROOT, env=environment() | idle, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_operations_of_one_element_each_become_one_kernel(found: Any) -> None:
    """Forward it reads gate and input and writes the sum, backward it reads gradient and gate and writes one."""
    elements = ROWS * 64
    kernels = [kernel for kernel in found["gated"]["compiled"] if kernel[1]]
    assert [kernel[:2] for kernel in kernels] == [[0, 3 * SINGLE * elements]] * 2
    # Forward 2 x, sigmoid, +, which read four tensors and write three; backward sigmoid's and 2 x, three and two.
    assert sum(moved for _, moved, _ in found["gated"]["eager"]) == (7 + 5) * SINGLE * elements


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_products_of_matrices(way: str, found: Any) -> None:
    kernels = found["two layers"][way]
    products = [kernel for kernel in kernels if "mm" in kernel[2]]
    backward = [128 * 32 + ROWS * (32 + 128), 128 * 32 + ROWS * (32 + 128), 64 * 128 + ROWS * (64 + 128)]
    forward = [64 * 128 + 128 + ROWS * (64 + 128), 128 * 32 + 32 + ROWS * (128 + 32)]
    assert sorted(moved for _, moved, _ in products) == sorted(HALF * size for size in forward + backward)
    assert sum(flops for flops, _, _ in products) == sum(flops for flops, _, _ in kernels) == FLOPS


def test_a_backward_pass_is_planned_for_results_as_they_lie(found: Any) -> None:
    """Where convolutions give channels last, a plan that does not know copies what was kept of them."""
    assert "convolution_backward" not in found["refiner"]
    assert found["refiner"].count("aten.convolution_backward.default") >= 2 * 3


def test_what_is_written_of_nest_tiny(found: Any) -> None:
    rows = json.loads((ROOT / "bench/results/traffic.json").read_text())["models"]
    [written] = [row for row in rows if (row["name"], row["way"]) == ("nest_tiny", "compiled")]
    for name in ("kernels", "gflop", "megabytes"):
        assert found["nest_tiny"][name] == pytest.approx(written[name], rel=0.02), name
    [timms] = [row for row in rows if (row["name"], row["way"]) == ("timm:nest_tiny_jx", "compiled")]
    assert timms["megabytes"] > 1.8 * found["nest_tiny"]["megabytes"]
