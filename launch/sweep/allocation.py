"""A Ray cluster on the nodes of a Slurm job, for as long as a sweep runs.

Not `ray symmetric-run`: that would keep the signal before the time limit from the sweep, whose trials could not save
then, and at its end stop every Ray on its nodes.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from launch.slurm import Allocation, slurm
from pipeline.errors import UserError

_START_SECONDS = 120.0
_END_SECONDS = 20.0
# Ports of workers and agents that the system chooses: two jobs may share a node.
_PORTS = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0")
_RAY = (str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", *_PORTS)


@contextmanager
def ray_on_allocation() -> Iterator[str]:
    """The address of a Ray cluster of all nodes of the job around this process; it ends with the block.

    Only who knows the job's token can use the cluster: others may reach its ports.

    Raises:
        UserError: this is no Slurm job, or Ray doesn't start.
    """
    allocation = Allocation.here()
    address = allocation.rendezvous()
    host, _, port = address.rpartition(":")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
    first, *others = slurm("scontrol", "show", "hostnames", allocation.facts["NodeList"]).split()
    head = ["--head", f"--node-ip-address={host}", f"--port={port}", "--include-dashboard=false"]
    steps = [_srun([first], head)]
    try:
        _wait_for(host, int(port), steps[0])
        if others:
            steps.append(_srun(others, [f"--address={address}"]))
        _wait_for_nodes(address, 1 + len(others))
        yield address
    finally:
        for step in reversed(steps):
            step.terminate()
        for step in steps:
            with suppress(subprocess.TimeoutExpired):
                step.wait(_END_SECONDS)
            step.kill()


def requeue(has_advanced: bool) -> None:
    """Put the job back into the queue, after it was asked to leave.

    Args:
        has_advanced: whether this start has brought an evaluation; without one the next start would do no better.
    """
    if not has_advanced:
        typer.echo(
            "rookery: no trial was evaluated in this job's time; ask for more (--time), then submit again", err=True
        )
        return
    slurm("scontrol", "requeue", Allocation.here().name)
    typer.echo("rookery: back in the queue", err=True)


def _srun(nodes: Sequence[str], options: Sequence[str]) -> subprocess.Popen[bytes]:
    count = len(nodes)
    srun = [
        "srun",
        f"--nodelist={','.join(nodes)}",
        f"--nodes={count}",
        f"--ntasks={count}",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--overlap",
    ]
    cpus = os.environ.get("SLURM_CPUS_ON_NODE")
    more = [] if cpus is None else [f"--num-cpus={cpus}"]
    return subprocess.Popen([*srun, *_RAY, *options, *more], stdout=subprocess.DEVNULL, start_new_session=True)


def _wait_for(host: str, port: int, step: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and step.poll() is None:
        with suppress(OSError), socket.create_connection((host, port), 1):
            return
        time.sleep(0.5)
    raise UserError(f"Ray doesn't start on the first node ({host}:{port}); what it says stands above")


def _wait_for_nodes(address: str, count: int) -> None:
    """Until all nodes have come; those that haven't after some time are done without."""
    from launch.sweep.cluster import connected

    with connected(address) as ray:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if sum(node["Alive"] for node in ray.nodes()) >= count:
                return
            time.sleep(0.5)
    typer.echo(f"rookery: not all of {count} nodes have started Ray; the sweep goes on with the others", err=True)
