"""A real Ray cluster on this machine: a GCS, and a raylet with workers of its own for each node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.train.commands import ROOT, command, environment

CPUS = 2


class RayCluster:
    """Use as a context manager: all processes end with it.

    Args:
        nodes: how many; the first one has the GCS.
        path: folders that come first where its processes, and sweeps, look for modules.
    """

    def __init__(self, nodes: int, *path: Path) -> None:
        self._count = nodes
        self._path = os.pathsep.join(map(str, [*path, ROOT]))
        self._nodes: list[Any] = []

    def __enter__(self) -> RayCluster:
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": self._path}
        os.environ.update(quiet | {"RAY_worker_niceness": "0"})
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(shutdown_at_exit=True)
        for _ in range(self._count):
            self.add_node()
        self._cluster.wait_for_nodes()
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        return self._cluster.address

    def add_node(self) -> None:
        # Of what Ray would start at once, nothing is needed: each process costs seconds.
        spared: dict[str, Any] = {"include_dashboard": False, "include_log_monitor": False}
        if not self._nodes:
            spared["_system_config"] = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
        self._nodes.append(self._cluster.add_node(num_cpus=CPUS, object_store_memory=80 * 2**20, **spared))

    def alive(self) -> list[int]:
        """The nodes that were not killed."""
        return [i for i, node in enumerate(self._nodes) if node.all_processes["raylet"][0].process.poll() is None]

    def processes(self, node: int) -> list[psutil.Process]:
        """The raylet of a node and all that it has started, directly or not."""
        raylet = psutil.Process(self._nodes[node].all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]

    def runs_on(self, node: int) -> dict[str, psutil.Process]:
        """The `rookery train` that run on a node, by the names of their runs."""
        found = {}
        for process in self.processes(node):
            with suppress(psutil.Error):
                words = process.cmdline()
                names = [word.removeprefix("name=") for word in words if word.startswith("name=")]
                if "train" in words and names:
                    found[names[-1]] = process
        return found

    def kill_node(self, node: int) -> None:
        """As if its power failed: `kill -9` of all its processes."""
        for process in self.processes(node):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def start_sweep(self, sweep: Path, *arguments: object) -> subprocess.Popen[str]:
        """`rookery sweep` in the sweep's folder; what it prints goes to `sweep.log` there."""
        with open(sweep.parent / "sweep.log", "a") as log:
            return subprocess.Popen(
                command("sweep", sweep, *arguments, "--address", self.address),
                cwd=sweep.parent,
                env=environment() | {"PYTHONPATH": self._path},
                stdout=log,
                stderr=log,
                text=True,
            )


def main() -> None:
    """For trying things by hand: a cluster that stays until Ctrl-C."""
    with RayCluster(int(sys.argv[1])) as cluster:
        print(cluster.address, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
