"""Running on the nodes of a Slurm job, and submitting one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import typer

from launch.slurm import Allocation, slurm
from launch.slurm_script import LOGS, SCRIPT, executable, options_of, standing_options, write_script
from launch.summary import print_summary
from launch.workers import Nodes
from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.resolve import Resolved, resolve
from pipeline.tracking.files import read_json, write_json
from pipeline.train.checkpoint import COMMIT
from pipeline.train.cores import BIND
from pipeline.train.recorder import check_same_run
from pipeline.train.setup import try_samples
from pipeline.train.stop import INTERRUPTED, RESUBMIT

_STARTS = "slurm.json"
_IDLE_STARTS = 3
_LINES = 20
# How long the other nodes may take to end after the first has: a checkpoint is saved by then, uploads are closed.
_GRACE_SECONDS = 60


@dataclass(frozen=True)
class Request:
    """What `rookery train` was asked for, as far as a job script repeats it.

    Attributes:
        config, overrides: the recipe and its changes.
        nproc: processes of a node; None: found out in the job.
        threads: CPU threads of a process; None: its share of the cores.
    """

    config: Path
    overrides: tuple[str, ...]
    nproc: int | None
    threads: int | None

    def arguments(self) -> list[str]:
        """Arguments of `rookery train` inside a job."""
        counts = {"--nproc": self.nproc, "--threads": self.threads}
        given = [text for option, value in counts.items() if value is not None for text in (option, str(value))]
        return [str(self.config), *self.overrides, *given, "--on-allocation"]


def submit(request: Request, nodes: int, options: Sequence[str], dry_run: bool) -> None:
    """Check a run, write its job script into its directory and submit that.

    Args:
        options: of sbatch, besides those that every job has.
        dry_run: only check.

    Raises:
        UserError: the run is not possible, or Slurm refuses the job.
    """
    if request.nproc is None:
        raise UserError("--slurm needs to know how many processes (GPUs) a node has: --nproc 8")
    job = Nodes(request.nproc, nodes)
    resolved = resolve(load_config(request.config, request.overrides), job.world_size)
    run = _directory(resolved)
    check_same_run(run, resolved)
    print_summary(resolved, job)
    try_samples(resolved)
    if dry_run:
        return
    slurm("sbatch", "--version")
    is_new = not run.exists()
    standing = [*standing_options(resolved.config.name, run), f"--nodes={nodes}", "--exclusive", "--mem=0"]
    script = write_script(run, [*standing, *options], request.arguments())
    try:
        number = slurm("sbatch", "--parsable", str(script)).strip().split(";")[0]
    except UserError:
        if is_new:
            script.unlink()
            (run / LOGS).rmdir()
            run.rmdir()
        raise
    typer.echo(f"submitted job {number}: {script}\nlogs: {run / LOGS}")


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
        request = Request(request.config, (*request.overrides, *own), request.nproc, request.threads)
        config = load_config(request.config, request.overrides)
    nproc = request.nproc or allocation.processes()
    nodes = Nodes(nproc, allocation.num_nodes, allocation.rendezvous() if allocation.num_nodes > 1 else None)
    resolved = resolve(config, nodes.world_size)
    run = _directory(resolved)
    check_same_run(run, resolved)
    print_summary(resolved, nodes)
    # A job that this very script started has asked for more than Slurm tells about it.
    if Path(allocation.facts.get("Command", "")) != (run / SCRIPT).absolute():
        options = [*standing_options(resolved.config.name, run), *options_of(allocation.facts)]
        write_script(run, options, request.arguments())
    logs = run / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    typer.echo(f"job {allocation.job} on {allocation.facts['NodeList']}; logs: {logs}/{allocation.job}-*.log")
    start = Start.of(run, allocation)
    status, is_ending = _srun(_node_command(request, nodes), nodes, logs, allocation)
    if status not in (0, RESUBMIT, INTERRUPTED):
        _show_end(logs, allocation.job)
    if is_ending and status:
        return INTERRUPTED
    if status not in (0, 2, INTERRUPTED):
        _go_on(allocation, run, status, start)
    return status


def _node_command(request: Request, nodes: Nodes) -> list[str]:
    command = [executable(), "train", str(request.config), *request.overrides, "--nproc", str(nodes.nproc)]
    if nodes.rendezvous is not None:
        command += ["--nodes", str(nodes.nodes), "--rendezvous", nodes.rendezvous]
    threads = request.threads or os.environ.get("ROOKERY_THREADS")
    return command if threads is None else [*command, "--threads", str(threads)]


def _srun(command: list[str], nodes: Nodes, logs: Path, allocation: Allocation) -> tuple[int, bool]:
    """Run a command once on each node and wait.

    Returns:
        The highest exit status, and whether Slurm is ending the job by itself.
    """
    count = nodes.nodes
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
            subprocess.Popen(["scancel", f"--signal={signal.Signals(number).name[3:]}", allocation.job])

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        # A session of its own: a terminal's Ctrl-C would make srun end the nodes at once.
        process = subprocess.Popen(
            [*srun, *command],
            start_new_session=True,
            env=os.environ | {BIND: "1", "PYTHONUNBUFFERED": "1"},
        )
        status = process.wait()
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
            slurm("scontrol", "requeue", allocation.job)
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


def newest_step(run: Path) -> int:
    """Step of the newest committed checkpoint, 0 without one; its hashes are not checked."""
    steps = [0]
    for commit in (run / "checkpoints").glob(f"step-*/{COMMIT}"):
        with suppress(ValueError):
            steps.append(int(commit.parent.name.removeprefix("step-")))
    return max(steps)


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


def _directory(resolved: Resolved) -> Path:
    return Path(resolved.config.out, resolved.config.name)
