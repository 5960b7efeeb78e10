"""What every worker process does around its job: logging, threads, the process group, the exit status."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable

import torch

from pipeline.errors import UserError
from pipeline.train.again import AGENT_PID, hope, leave_alone
from pipeline.train.cores import bind_cores
from pipeline.train.determinism import use_whole_float32
from pipeline.train.distributed import PeerError, World, fails_together, open_world
from pipeline.train.no_room import no_room
from pipeline.train.status import MISTAKE
from pipeline.train.stop import Stopped, catch_signals, stop_now

# Environment variable by which `launch` tells its workers with which command they were started.
COMMAND = "ROOKERY_COMMAND"


def run_process(job: Callable[[World], object], threads: int | None = None) -> int:
    """Run a job in this process and return its exit status: 0, 2 for a user's mistake, 1 for a store out of reach, see
    `stop` for signals.

    A mistake is printed once.

    Args:
        job: gets this process's place in the world.
        threads: CPU threads of torch; None leaves torch's default (OMP_NUM_THREADS).
    """
    die_with_parent()
    bind_cores()
    if COMMAND in os.environ:
        sys.argv = json.loads(os.environ[COMMAND])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if threads is not None:
        torch.set_num_threads(threads)
    use_whole_float32()
    catch_signals(stop_now)
    world = None
    try:
        with open_world() as world:
            job(world)
    except Stopped as stop:
        return stop.status
    except UserError as error:
        if not (isinstance(error, PeerError) or error.told):
            print(f"rookery: {error}", file=sys.stderr, flush=True)
        if error.status != MISTAKE:
            hope()
        elif not fails_together(error):
            leave_alone()
        return error.status
    except torch.OutOfMemoryError as error:
        print(f"rookery: {no_room(error, world)}", file=sys.stderr, flush=True)
        leave_alone()
        return MISTAKE
    return 0


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it is killed, a torchrun agent or a trial of a sweep.

    Both put what they start into sessions of their own, so a kill of their process group does not reach it; it would
    go on as an orphan, and keep the run directory locked.
    """
    agent = os.environ.get(AGENT_PID)
    if agent is None or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(agent):  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
