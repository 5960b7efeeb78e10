"""`rookery bench generate`: rounds in turn, ratios of one round, what is written beside the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import cli
from pipeline.generate import bench


def run(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(cli._commands, ["bench", "generate", *map(str, arguments)], env={"COLUMNS": "200"})
    assert done.exit_code == status, done.output
    return done.output


def test_a_ratio_is_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is read before and after every forward, and in rounds that slow both down by the same factor."""
    seconds = iter([9.0, 9.0, 1.0, 5.0, 10.0, 50.0, 2.0, 12.0])  # the first of each isn't counted
    now, reads = 0.0, 0

    def clock() -> float:
        nonlocal now, reads
        now += next(seconds) if reads % 2 else 0.0
        reads += 1
        return now

    monkeypatch.setattr(bench, "perf_counter", clock)
    first, other = bench.bench_generators(["nest_gen_micro", "plane_gen_micro"], 4, 3, "fp32", {})
    assert first["images_per_second"] == {"median": 2, "min": 0.4, "max": 4}
    assert other["images_per_second"] == pytest.approx({"median": 1 / 3, "min": 0.08, "max": 0.8})
    assert first["times_as_long"] == {"median": 1, "min": 1, "max": 1}
    assert other["times_as_long"] == {"median": 5, "min": 5, "max": 6}
    assert other["times_the_macs"] == 13_205_504 / 8_880_128 and other["params"] == first["params"]


def test_report(tmp_path: Path) -> None:
    arguments = ("nest_gen_micro", "conv_gen_micro", "--batch", 2, "--rounds", 2, "--precision", "bf16")
    report: dict[str, Any] = json.loads(run(*arguments, "--json", "--out", tmp_path / "bench.json"))
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert report["batch"] == report["rounds"] == 2 and report["precision"] == "bf16" and report["threads"] >= 1
    assert report["device"] and report["versions"]["torch"] and report["load_before"] >= 0
    for row in report["generators"]:
        rate = row["images_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    table = run(*arguments)
    assert "nest_gen_micro" in table and "0.009" in table and "Median of 2 rounds" in table
    assert "did you mean" in str(cli_error("nest_gen_46"))
    assert "fp32 and bf16" in str(cli_error("nest_gen_micro", "--precision", "fp8"))


def cli_error(*arguments: str) -> BaseException | None:
    return CliRunner().invoke(cli._commands, ["bench", "generate", *arguments]).exception
