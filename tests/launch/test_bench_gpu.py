"""bench/gpu.sh without a GPU: its parts can be built, and what fails, crashes or hangs leaves the others measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from bench import gpu, gpu_checks, gpu_parts
from launch.bench_model.contender import contender

ROOT = Path(__file__).resolve().parents[2]
# Stands in for gpu_parts.py, whose kernels need a GPU: notes which parts it gets, and does to them what FAIL says.
WORKER = """
import argparse, json, os, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("parts", nargs="+")
parser.add_argument("--out", type=Path)
parser.add_argument("--command")
parser.add_argument("--plain", action="append", default=[])
parser.add_argument("--seconds", type=float)
options = parser.parse_args()
fail = json.loads(os.environ["FAIL"])
for name in options.parts:
    way = fail.get(name + " plain" * (name in options.plain))
    if way == "late":
        break
    print("begin", name, flush=True)
    with (options.out / "log").open("a") as log:
        print(name, *["plain"] * (name in options.plain), file=log)
    (options.out / f"model_{name}.json").write_text(json.dumps({"command": options.command}))
    if way == "crash":
        os.abort()
    if way == "hang":
        time.sleep(600)
    if way:
        print("failed", way, flush=True)
        sys.exit(1)
    print("end", name, flush=True)
"""
ALL = ["checks", "kernel_checks", "eager", "starts", "refine_kernels"]
PLAIN = ["eager plain", "starts plain"]


@pytest.mark.parametrize("part", gpu_parts.PARTS)
def test_parts_can_be_built(part: str) -> None:
    chosen = gpu_parts.PARTS[part]
    assert chosen.against in chosen.names
    for name in chosen.names:
        if name.startswith("timm:"):
            assert timm.is_model(name.removeprefix("timm:"))
        else:
            assert contender(name, chosen.side).name == name


def test_at_a_tiny_size(tmp_path: Path) -> None:
    command = [ROOT / "bench" / "gpu.sh", "--tiny", "--only", "checks,kernel_checks,eager", "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_checks.json", "model_eager.json"]
    checks, eager = (json.loads((tmp_path / f"model_{name}.json").read_text()) for name in ("checks", "eager"))
    assert len(checks["checks"]) == 7 and all(row["passed"] for row in checks["checks"])
    assert len(eager["models"]) == 6 and not any("failed" in row for row in eager["models"])
    assert eager["command"].startswith("bench/gpu.sh --tiny") and eager["minutes"] > 0


@pytest.mark.parametrize(
    ("fail", "worked", "status", "why"),
    [
        pytest.param({}, ALL, 0, {}, id="all is well"),
        pytest.param({"checks": "wrong"}, ["checks"], 1, {"checks": "wrong"}, id="fast paths are wrong"),
        pytest.param(
            {"kernel_checks": "wrong"}, [*ALL[:2], *PLAIN], 1, {"kernel_checks": "wrong"}, id="kernels are wrong"
        ),
        pytest.param(
            {"kernel_checks": "hang"},
            [*ALL[:2], *PLAIN],
            1,
            {"kernel_checks": "took more than 3 s"},
            id="kernels hang",
        ),
        pytest.param(
            {"eager": "crash"}, [*ALL[:3], PLAIN[0], *ALL[3:]], 1, {}, id="a kernel crashes where it is measured"
        ),
        pytest.param(
            {"eager": "crash", "eager plain": "no memory"},
            [*ALL[:3], PLAIN[0], *ALL[3:]],
            1,
            {"eager": "no memory"},
            id="a part crashes in any case",
        ),
        pytest.param(
            {"starts": "crash"}, ALL, 1, {"starts": "its process ended with -6"}, id="no kernels to leave out"
        ),
        pytest.param({"starts": "late"}, ALL[:3], 1, {}, id="no time left"),
    ],
)
def test_what_fails_leaves_the_rest(
    fail: dict[str, str],
    worked: list[str],
    status: int,
    why: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, "-c", WORKER])
    monkeypatch.setattr(gpu, "LONGEST_CHECKS", 3.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--only", ",".join(ALL), "--out", str(tmp_path)])
    monkeypatch.setenv("FAIL", json.dumps(fail))
    assert gpu.main() == status
    assert (tmp_path / "log").read_text().splitlines() == worked
    reports = {path.stem.removeprefix("model_"): json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name: report["failed"] for name, report in reports.items() if "failed" in report} == why
    assert all(report["command"].startswith("bench/gpu.sh --only checks") for report in reports.values())
    if "late" in fail.values():
        assert [f"run it by --only {name}" in capsys.readouterr().err for name in ALL[3:4]] == [True]


def test_a_process_that_fails_outside_of_its_parts_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, "-c", "raise ImportError"])
    monkeypatch.setattr("sys.argv", ["gpu.py", "--tiny", "--only", "checks", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="ended with 1 outside of its parts"):
        gpu.main()


@pytest.mark.parametrize(
    ("checks", "told"),
    [
        ([True, True], ["begin checks", "end checks", "begin eager", "end eager"]),
        ([True, False], ["begin checks", "failed [{'name': '1', 'passed': False}]"]),
        ([True, None], ["begin checks", "failed no such kernel"]),
        ([False, None], ["begin checks", "failed [{'name': '0', 'passed': False}]"]),
    ],
)
def test_a_process_works_until_something_fails(
    checks: list[bool | None],
    told: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def rows(tiny: bool) -> Iterator[dict[str, Any]]:
        for i, passed in enumerate(checks):
            if passed is None:
                raise RuntimeError("no such\nkernel")
            yield {"name": str(i), "passed": passed}

    monkeypatch.setattr(gpu_checks, "fast_paths", rows)
    monkeypatch.setattr(gpu_parts, "measured", lambda part, command: {"models": list(part.names)})
    arguments = ["checks", "eager", "--out", str(tmp_path), "--command", "c", "--tiny", "--seconds=60"]
    monkeypatch.setattr("sys.argv", ["gpu_parts.py", *arguments])
    assert gpu_parts.main() == (0 if all(checks) else 1)
    assert capsys.readouterr().out.splitlines() == told
    report = json.loads((tmp_path / "model_checks.json").read_text())
    assert [row["passed"] for row in report["checks"]] == [passed for passed in checks if passed is not None]
    assert {"command", "device", "versions"} < report.keys()
    assert (tmp_path / "model_eager.json").exists() is all(checks)


@pytest.mark.parametrize(
    ("names", "against", "left"),
    [
        (["a", "b+triton"], "a", None),
        (["c+triton", "d", "e"], "c+triton", None),
        (["a", "b+triton", "e"], "a", ["a", "e"]),
    ],
)
def test_parts_without_kernels(names: list[str], against: str, left: list[str] | None) -> None:
    part = gpu_parts.without(gpu_parts.Part(names, against, 1), gpu_parts.OPT_IN)
    assert (part and list(part.names)) == left


def test_no_number_is_no_small_error() -> None:
    one, none, nothing = torch.ones(2), torch.tensor([1.0, torch.nan]), torch.zeros(2)
    found = [gpu_checks.worst([a], [b]) for a, b in ((one, none), (none, one), (nothing, nothing))]
    assert found == [math.inf] * 3 and gpu_checks.worst([one], [one]) == 0
    found = [gpu_checks.overall([a], [b]) for a, b in ((one, none), (none, one), (nothing, nothing))]
    assert found == [math.inf] * 3 and gpu_checks.overall([one], [one]) == 0
    assert not gpu_checks.row("k", [none], [one], math.inf)["passed"]


def test_a_kernel_that_raises_is_a_failed_check() -> None:
    def broken() -> Any:
        raise RuntimeError("illegal access")

    row = gpu_checks.attempt("k", broken, 1.0)
    assert not row["passed"] and "illegal access" in row["error"]


@pytest.mark.parametrize(("broken", "passed"), [("raises", True), ("wrong", False)])
def test_what_cannot_be_compiled_stops_nothing_else(broken: str, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(model: Any, backend: str) -> Any:
        def run(images: torch.Tensor) -> torch.Tensor:
            if broken == "raises":
                raise RuntimeError("no C compiler")
            return 2 * model(images)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    row = next(row for row in gpu_checks.fast_paths(tiny=True) if "compiled" in row["name"])
    assert row["passed"] is passed and ("no C compiler" in str(row["error"])) is passed


def test_what_a_part_has_started_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that hangs holds the pipe of the process that started it."""
    program = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('begin eager', flush=True); "
    monkeypatch.setattr(gpu, "LONGEST", 10.0)
    began = time.monotonic()
    ended = gpu.process([sys.executable, "-c", program + "time.sleep(60)"])
    assert ended.failed == "eager" and ended.why == "took more than 10 s" and time.monotonic() - began < 40
