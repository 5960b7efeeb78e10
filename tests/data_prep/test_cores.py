"""Cores of a process that is limited: by the CPUs it may run on, or by its time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.cores import usable_cores
from pipeline.train.cores import num_cores

V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({f"{V2}/cpu.max": "200000 100000\n"}, 2),
        ({f"{V2}/cpu.max": "150000 100000\n"}, 2),
        ({f"{V2}/cpu.max": "50000 100000\n"}, 1),
        ({f"{V2}/cpu.max": "max 100000\n"}, 8),
        ({f"{V2}/cpu.max": "6400000 100000\n"}, 8),
        ({f"{V2}/cpu.max": ""}, 8),
        ({f"{V2}/cpu.max": "many 0\n"}, 8),
        ({f"{V1}/cpu.cfs_quota_us": "250000\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, 3),
        ({f"{V1}/cpu.cfs_quota_us": "-1\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, 8),
        ({f"{V1}/cpu.cfs_quota_us": "250000\n"}, 8),
        # Of a group and those above it the least counts.
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/cpu.max": "300000 100000", f"{V2}/a/b/cpu.max": "max 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/cpu.max": "9 1", f"{V2}/a/b/cpu.max": "4 1"}, 4),
        ({"proc/self/cgroup": "0::/other\n", f"{V2}/a/cpu.max": "3 1"}, 8),
        # The host's name of a group whose own files are at the top.
        ({"proc/self/cgroup": "0::/docker/1f\n", f"{V2}/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/../a\n", f"{V2}/cpu.max": "200000 100000"}, 2),
        (
            {
                "proc/self/cgroup": "5:memory:/b\n4:cpu,cpuacct:/a\n0::/\n",
                f"{V1}/a/cpu.cfs_quota_us": "400000",
                f"{V1}/a/cpu.cfs_period_us": "100000",
                f"{V1}/b/cpu.cfs_quota_us": "100000",
                f"{V1}/b/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
    ids=str,
)
def test_time_counts_as_cores(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == expected


def test_this_machine_has_some() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_nobody_else_counts_them() -> None:
    root = Path(__file__).parents[2]
    files = [file for room in ("data_prep", "pipeline", "launch") for file in (root / room).rglob("*.py")]
    assert [file.name for file in files if "len(os.sched_getaffinity" in file.read_text()] == ["cores.py"]


@pytest.mark.parametrize(("size", "expected"), [(1, 6), (2, 3), (8, 1)])
def test_processes_of_a_node_share_them(size: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.train.cores.usable_cores", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
    assert num_cores() == expected
