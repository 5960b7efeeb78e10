"""Running on the nodes of a Slurm job.

This module is imported without torch: the script of a job has only to start the nodes, where everything is checked.
"""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import typer

from launch.slurm import Allocation, slurm
from launch.slurm_script import (
    LOGS,
    SCRIPT,
    Request,
    executable,
    given_options,
    options_of,
    standing_options,
    write_script,
)
from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.tracking.files import read_json, write_json
from pipeline.train.again import newest_step
from pipeline.train.cores import BIND
from pipeline.train.status import INTERRUPTED, RESUBMIT

_STARTS = "slurm.json"
_IDLE_STARTS = 3
_LINES = 20
# How long the other nodes may take to end after the first has: a checkpoint is saved by then, uploads are closed.
_GRACE_SECONDS = 60


def run_on_nodes(request: Request) -> int:
    """Train on all nodes of the job around this process, from its batch script or an interactive allocation.

    The job is put back into the queue when it ended before its time limit or on SIGUSR1, and when it failed after a
    new checkpoint: then a node may have died, and a mistake in the run would soon fail again without one.

    Returns:
        The exit status of the training.
    """
    allocation = Allocation.here()
    config = load_config(request.config, request.overrides)
    if allocation.seed is not None:
        own = (f"seed={allocation.seed}", f"name={config.name}-seed{allocation.seed}")
        request = replace(request, overrides=(*request.overrides, *own))
        config = load_config(request.config, request.overrides)
    run = Path(config.out, config.name)
    # A job that this very script started has asked for more than Slurm tells about it.
    if Path(allocation.facts.get("Command", "")).resolve() != (run / SCRIPT).resolve():
        options = [*standing_options(config.name, run), *options_of(allocation.facts)]
        write_script(run, options, request.arguments())
    logs = run / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    typer.echo(f"job {allocation.job} on {allocation.facts['NodeList']}; logs: {logs}/{allocation.job}-*.log")
    start = Start.of(run, allocation)
    status, is_ending = _srun(_node_command(request, allocation), logs, allocation)
    if status not in (0, RESUBMIT, INTERRUPTED):
        _show_end(logs, allocation.job)
    if is_ending and status:
        return INTERRUPTED
    if status not in (0, 2, INTERRUPTED):
        _go_on(allocation, run, status, start)
    return status


def _node_command(request: Request, allocation: Allocation) -> list[str]:
    nproc = request.nproc or allocation.processes()
    command = [executable(), "train", str(request.config), *request.overrides, "--nproc", str(nproc)]
    if allocation.num_nodes > 1:
        command += ["--nodes", str(allocation.num_nodes), "--rendezvous", allocation.rendezvous()]
    threads = request.threads or os.environ.get("ROOKERY_THREADS")
    return [*command, *given_options({"--threads": threads, "--restarts": request.restarts})]


def step_environment() -> dict[str, str]:
    """For the step that starts one `rookery train` on each node, with all GPUs that the job has there.

    What the job asked for each task, or binds to each, would hold for this one.
    """
    left_out = ("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {BIND: "1", "PYTHONUNBUFFERED": "1"}


def _srun(command: list[str], logs: Path, allocation: Allocation) -> tuple[int, bool]:
    """Run a command once on each node and wait.

    Returns:
        The highest exit status, and whether Slurm is ending the job by itself.
    """
    count = allocation.num_nodes
    srun = [
        "srun",
        f"--nodes={count}",
        f"--ntasks={count}",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--overlap",  # after a node failed, Slurm may still count its part of the step before as busy
        "--kill-on-bad-exit=0",
        f"--wait={_GRACE_SECONDS}",
        "--open-mode=append",
        f"--output={logs.absolute()}/%j-%n-%N.log",
    ]
    ending: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:  # Slurm ends the job, and tells the nodes itself
            ending.append(number)
        else:
            subprocess.Popen(["scancel", f"--signal={signal.Signals(number).name[3:]}", allocation.name])

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        # A session of its own: a terminal's Ctrl-C would make srun end the nodes at once.
        process = subprocess.Popen(
            [*srun, *command],
            start_new_session=True,
            env=step_environment(),
        )
        status = process.wait()
        if status == 128 + signal.SIGUSR1:  # it came while a node was still starting, with nothing to save
            status = RESUBMIT
        return (status if status >= 0 else 1), bool(ending)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _go_on(allocation: Allocation, run: Path, status: int, start: Start) -> None:
    """Put a job that did not finish back into the queue, or say why not."""
    step, by_hand = newest_step(run), f"go on with: {run / SCRIPT}"
    if status != RESUBMIT and step == start.step:
        _say(f"failed with exit status {status} and no new checkpoint; mend it, then {by_hand}")
    elif step == start.step and start.idle >= _IDLE_STARTS:
        _say(f"{_IDLE_STARTS} starts in a row made no checkpoint; ask for more time (--time), then {by_hand}")
    else:
        try:
            slurm("scontrol", "requeue", allocation.name)
            _say(f"back in the queue after step {step}")
        except UserError as error:
            _say(f"{error}; {by_hand}")


def _say(text: str) -> None:
    typer.echo(f"rookery: {text}", err=True)


def _show_end(logs: Path, job: str) -> None:
    """The last lines of the log that was written last."""
    written = sorted(logs.glob(f"{job}-*.log"), key=lambda path: path.stat().st_mtime)
    if written:
        lines = written[-1].read_text(errors="replace").splitlines()[-_LINES:]
        _say("\n".join([f"the end of {written[-1]}:", *lines]))


@dataclass(frozen=True)
class Start:
    """Where a job begins.

    Attributes:
        step: of the newest checkpoint.
        idle: starts of this job in a row, this one included, that began there.
    """

    step: int
    idle: int

    @classmethod
    def of(cls, run: Path, allocation: Allocation) -> Start:
        """Compare with the start before, and write this one down."""
        step = newest_step(run)
        now = {"job": allocation.job, "step": step}
        saved = read_json(run / _STARTS) or {}
        if {key: saved.get(key) for key in now} != now:
            saved = now | {"restarts": allocation.restarts}
            write_json(run / _STARTS, saved)
        return cls(step, allocation.restarts - saved["restarts"] + 1)
