"""Starting the worker processes of this node: one torchrun agent around a worker module."""

from __future__ import annotations

import importlib
import json
import logging
import os
import socket
import sys
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import psutil
import torch

from data_prep.cores import usable_cores
from launch.meeting import Meeting
from launch.quiet import unquiet_workers
from pipeline.errors import UserError
from pipeline.train.again import AGENT_PID, FOLDER, JOB, chosen_status, has_begun, has_left_alone, most_telling
from pipeline.train.process import COMMAND, die_with_parent
from pipeline.train.status import FAILED, INTERRUPTED
from pipeline.train.stop import STATUS, Stopped, catch_signals, stop_now
from pipeline.wording import counted

# How long nodes wait for each other, at the start and after a process has died.
_JOIN_SECONDS = 600


@dataclass(frozen=True)
class Nodes:
    """The shape of a job.

    Attributes:
        nproc: processes on each node.
        nodes: number of nodes; every one of them runs the same command.
        rendezvous: `host:port` of the first node, needed with more than one.
    """

    nproc: int
    nodes: int = 1
    rendezvous: str | None = None

    @property
    def world_size(self) -> int:
        return self.nproc * self.nodes

    def check(self) -> None:
        """Whether the nodes can meet.

        Raises:
            UserError: `rendezvous` is missing, or no place where they could.
        """
        if self.nodes == 1:
            if self.rendezvous is not None:
                raise UserError("--rendezvous goes with --nodes N, the number of nodes that meet there")
            return
        if self.rendezvous is None:
            raise UserError("a job of several nodes needs --rendezvous HOST:PORT, the same on every node")
        host, _, port = self.rendezvous.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(f"--rendezvous {self.rendezvous}: write HOST:PORT, such as node1:29500")
        try:
            Meeting.at(self.rendezvous)
        except OSError as error:
            why = "is not known" if isinstance(error, socket.gaierror) else "can't be reached"
            raise UserError(f"--rendezvous {self.rendezvous}: {host} {why} here ({error.strerror})") from error


def check_gpus(nproc: int) -> None:
    """Whether every process of this node has a GPU, where there are any.

    Raises:
        UserError: there are fewer, or none of those that Slurm has given.
    """
    gpus = torch.cuda.device_count()
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if gpus == 0 and given.isdecimal() and int(given) > 0 and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        raise UserError(
            f"Slurm has given this job {counted(int(given), 'GPU')} of {socket.gethostname()}, and PyTorch sees none; "
            "look at nvidia-smi there (srun nvidia-smi), or set CUDA_VISIBLE_DEVICES= (nothing) to compute on the CPU"
        )
    if 0 < gpus < nproc:
        raise UserError(
            f"--nproc {nproc}: each process takes a GPU, and this node has {counted(gpus, 'GPU')}; set --nproc {gpus}, "
            "or CUDA_VISIBLE_DEVICES= (nothing) to compute on the CPU"
        )


def start_workers(module: str, payload: str, nodes: Nodes, threads: int | None = None, restarts: int = 0) -> int:
    """Run a worker module on this node's processes and wait.

    A job of one process runs inside this one. Workers print their own messages; nothing is added to them here.

    Args:
        module: has `run(payload, threads) -> status`.
        payload: what to do, whole, so that workers read nothing again.
        nodes: how many processes and where.
        threads: CPU threads of each process; None shares the usable cores among them.
        restarts: how often all processes are started again after one of several has died.

    Returns:
        The exit status: 0, 2 for a user's mistake, 130 or 75 when a signal ended it (see `pipeline.train.stop`), 1 for
        any other failure.
    """
    threads = threads or max(1, usable_cores() // nodes.nproc)
    if nodes.world_size > 1:
        nodes.check()
    check_gpus(nodes.nproc)
    if nodes.world_size == 1:
        return importlib.import_module(module).run(payload, threads)
    die_with_parent()
    # Not `python -m module`: the loader processes would import the main module, and with it all of training, once more.
    # And no interpreter shutdown: threads of torch that still run then can end a finished worker with an abort.
    # Signals end a worker silently until it has handlers of its own.
    program = (
        "import atexit, os, signal, sys; [signal.signal(n, signal.SIG_DFL) for n in (2, 10, 15)]; "
        f"from pipeline.train.again import work; status = work('{module}'); "
        "atexit._run_exitfuncs(); sys.stdout.flush(); sys.stderr.flush(); os._exit(status)"
    )
    # The environment, unlike a command line, is not for every user of the machine to read.
    os.environ[JOB] = payload
    with tempfile.TemporaryDirectory(prefix="rookery-") as folder:
        os.environ[FOLDER] = folder
        return _torchrun([sys.executable, "-c", program], nodes, threads, restarts)


def _torchrun(command: list[str], nodes: Nodes, threads: int, restarts: int) -> int:
    os.environ["LOGLEVEL"] = "CRITICAL"  # read when the agent's modules are imported
    # A store of its own for every start: in a shared one processes would find the addresses of dead ones.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters

    from launch.agent import run_agent

    unquiet_workers()
    # The agent's own log repeats what the workers say.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ |= {"OMP_NUM_THREADS": str(threads), AGENT_PID: str(os.getpid()), COMMAND: json.dumps(sys.argv)}
    meeting = Meeting("localhost:0", None) if nodes.rendezvous is None else Meeting.at(nodes.rendezvous)
    meeting.choose_network()
    parameters = RendezvousParameters(
        backend="c10d",
        run_id=uuid.uuid4().hex if nodes.nodes == 1 else os.environ.get("SLURM_JOB_ID", "rookery"),
        min_nodes=nodes.nodes,
        max_nodes=nodes.nodes,
        join_timeout=_JOIN_SECONDS,
        **meeting.parameters(),
    )
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # the others are passed on, not answered by a kill
    passed_on: list[int] = []
    _pass_on_signals(passed_on)

    def is_chosen() -> bool:
        # A process that a signal ends while it starts leaves no status.
        return bool(passed_on) or chosen_status() is not None

    try:
        result = run_agent(command, nodes.nproc, parameters, restarts, is_chosen, has_left_alone)
    except RendezvousError as error:
        status = chosen_status() or (STATUS[passed_on[0]] if passed_on else None)
        if status is None:
            _say(_parted(nodes, error))
        return status or FAILED
    except Stopped as stop:
        return stop.status
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    if not result.is_failed():
        return 0
    told = STATUS[passed_on[0]] if passed_on else FAILED
    return most_telling([failure.exitcode for failure in result.failures.values()], told)


def _parted(nodes: Nodes, error: Exception) -> str:
    """Why a node has to give up alone."""
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError

    again = "start the same command on all nodes"
    if isinstance(error, RendezvousClosedError):
        return f"another node has ended the run, and its log says why; to go on, {again}"
    if isinstance(error, RendezvousTimeoutError):
        reason = f"not all of the {nodes.nodes} nodes came to {nodes.rendezvous} within {_JOIN_SECONDS // 60} minutes"
        return f"{reason}; {again}, and see that they reach that port"
    if has_begun():
        return f"the node of {nodes.rendezvous}, where all meet, is gone; to go on, {again}"
    return f"no answer from {nodes.rendezvous} ({error.__cause__ or error}); {again}, and see that they reach that port"


def _say(text: str) -> None:
    print(f"rookery: {text}", file=sys.stderr, flush=True)


def _pass_on_signals(passed_on: list[int]) -> None:
    """Hand signals to the workers, which agree on a step, save and end; before there are any, end here.

    Args:
        passed_on: gets the numbers.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        # torchrun puts workers into sessions of their own, which a terminal's Ctrl-C does not reach.
        children = [child.pid for child in psutil.Process().children()]
        workers = [pid for pid in children if pid == _session(pid)]
        if not workers:
            stop_now(number)
        passed_on.append(number)
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    catch_signals(pass_on)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
