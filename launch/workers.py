"""Starting the worker processes of this node: one torchrun agent around a worker module."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import psutil

from pipeline.errors import UserError
from pipeline.train.again import FOLDER, JOB
from pipeline.train.process import AGENT_PID, COMMAND
from pipeline.train.status import INTERRUPTED, RESUBMIT
from pipeline.train.stop import STATUS, catch_signals, stop_now


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


def start_workers(module: str, payload: str, nodes: Nodes, threads: int | None = None, restarts: int = 0) -> int:
    """Run a worker module on this node's processes and wait.

    A job of one process runs inside this one. Workers print their own messages; nothing is added to them here.

    Args:
        module: has `run(payload, threads) -> status`.
        payload: what to do, whole, so that workers read nothing again.
        nodes: how many processes and where.
        threads: CPU threads of each process; None shares the usable cores among them.
        restarts: how often all processes are started again after one of several has died; of one node only.

    Returns:
        The exit status: 0, 2 for a user's mistake, 130 or 75 when a signal ended it (see `pipeline.train.stop`), 1 for
        any other failure.
    """
    threads = threads or max(1, len(os.sched_getaffinity(0)) // nodes.nproc)
    if nodes.world_size == 1:
        return importlib.import_module(module).run(payload, threads)
    if nodes.nodes > 1 and nodes.rendezvous is None:
        raise UserError("a job of several nodes needs --rendezvous HOST:PORT, the same on every node")
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
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent's own log repeats what the workers say.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ |= {"OMP_NUM_THREADS": str(threads), AGENT_PID: str(os.getpid()), COMMAND: json.dumps(sys.argv)}
    launch = LaunchConfig(
        min_nodes=nodes.nodes,
        max_nodes=nodes.nodes,
        nproc_per_node=nodes.nproc,
        run_id=uuid.uuid4().hex if nodes.nodes == 1 else os.environ.get("SLURM_JOB_ID", "rookery"),
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.rendezvous or "localhost:0",
        max_restarts=restarts if nodes.nodes == 1 else 0,
    )
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # the others are passed on, not answered by a kill
    passed_on: list[int] = []
    _pass_on_signals(passed_on)
    try:
        elastic_launch(launch, command[0])(*command[1:])
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        expected = (2, RESUBMIT, INTERRUPTED)
        return next((code for code in expected if code in codes), STATUS[passed_on[0]] if passed_on else 1)
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    return 0


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
