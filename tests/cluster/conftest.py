"""A Slurm cluster for the tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.slurm_cluster import SlurmCluster, missing_programs
from tests.conftest import missing
from tests.train.conftest import digits, fork_server

__all__ = ["digits", "fork_server"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    absent = missing_programs()
    if absent:
        missing(f"Slurm left out: {', '.join(absent)} not installed (bash .ci/system-packages names the packages)")
    with SlurmCluster(["node1", "node2"]) as cluster:
        yield cluster
