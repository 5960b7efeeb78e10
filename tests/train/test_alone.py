"""A process that fails alone ends at once, tells why, and takes the others with it, though they wait for it and hear
no signal. So do processes in a collective of NCCL, and to leave its group waits for all others: there is none here, so
both are imitated.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from launch.workers import Nodes, check_gpus, start_workers
from pipeline.errors import Unreachable, UserError
from pipeline.train.distributed import World, _check_devices, open_world
from pipeline.train.process import run_process
from pipeline.train.status import FAILED, MISTAKE
from pipeline.train.stop import Stopped
from tests.train.commands import ROOT, environment

FAULTS = {
    "mistake": UserError("shard 3 is damaged"),
    "unreachable": Unreachable("no answer from the store"),
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
    "crash": RuntimeError("an illegal instruction"),
}


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("mistake", MISTAKE, "rookery: shard 3 is damaged\n"),
        ("unreachable", FAILED, "rookery: no answer from the store\n"),
        ("memory", MISTAKE, "rookery: "),
        ("crash", FAILED, "RuntimeError: an illegal instruction\n"),
    ],
)
def test_the_others_end_too(fault: str, status: int, said: str) -> None:
    command = [sys.executable, "-m", __name__, fault]
    # Left alone, the others would sleep for longer.
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert ("Traceback" in done.stderr) == (fault == "crash")


def _fail_alone(world: World) -> None:
    def wait_for_the_others() -> None:
        time.sleep(1000)

    dist.destroy_process_group = wait_for_the_others
    world.barrier()
    if world.rank == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        time.sleep(1000)
    time.sleep(1)  # until rank 0 has passed the barrier as well
    raise FAULTS[os.environ["FAULT"]]


def run(payload: str, threads: int | None = None) -> int:
    """What the worker processes of `test_the_others_end_too` do."""
    return run_process(_fail_alone, threads)


@pytest.mark.parametrize(
    ("size", "error", "leaves"),
    [
        (2, None, True),
        (2, Stopped(agreed=True), True),
        (2, Stopped(), False),
        (2, UserError("a damaged shard"), False),
        (2, RuntimeError("a bug"), False),
        (1, RuntimeError("a bug"), True),
    ],
    ids=lambda value: str(value) if not isinstance(value, BaseException) else repr(value),
)
def test_only_those_that_end_together_leave_the_group(
    size: int, error: BaseException | None, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[bool] = []
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    monkeypatch.setattr(World, "gather", lambda self, item: [item] * self.size)
    try:
        with open_world():
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    assert bool(left) == leaves


@pytest.mark.parametrize(
    ("kinds", "ranks"),
    [
        (["cuda"] * 16, None),
        (["cpu"] * 16, None),
        (["cuda"] * 3 + ["cpu"], "of 4 processes 1 see no GPU (rank 3)"),
        (["cuda"] * 8 + ["cpu"] * 9, "of 17 processes 9 see no GPU (rank 8, 9, 10, 11, 12, 13, 14, 15, ...)"),
    ],
    ids=["GPUs", "CPUs", "one without", "a node without"],
)
def test_a_node_whose_gpus_are_out_of_order_is_named(
    kinds: list[str], ranks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "gather", lambda self, item: kinds)
    world = World(0, len(kinds), 0, torch.device(kinds[0]))
    if ranks is None:
        _check_devices(world)
        return
    with pytest.raises(UserError) as raised:
        _check_devices(world)
    assert ranks in str(raised.value) and raised.value.agreed


@pytest.mark.parametrize(
    ("given", "visible", "gpus", "nproc", "said"),
    [
        ("8", "0,1,2,3,4,5,6,7", 8, 8, None),
        ("8", "0,1,2,3,4,5,6,7", 0, 8, "Slurm has given this job 8 GPUs of"),
        ("1", None, 0, 1, "Slurm has given this job 1 GPU of"),
        ("8", "", 0, 8, None),
        (None, None, 0, 8, None),
        ("4", "0,1,2,3", 4, 8, "--nproc 8: each process takes a GPU, and this node has 4 GPUs"),
    ],
)
def test_gpus_that_were_given_and_are_not_seen(
    given: str | None, visible: str | None, gpus: int, nproc: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in {"SLURM_GPUS_ON_NODE": given, "CUDA_VISIBLE_DEVICES": visible}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    if said is None:
        check_gpus(nproc)
        return
    with pytest.raises(UserError) as raised:
        check_gpus(nproc)
    assert said in str(raised.value)


if __name__ == "__main__":
    os.environ["FAULT"] = sys.argv[1]
    os._exit(start_workers("tests.train.test_alone", "", Nodes(2)))
