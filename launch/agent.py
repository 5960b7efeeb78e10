"""The torchrun agent of a node. It knows a status that a process chose from a death, and the end of another node."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from pipeline.train.again import FOLDER

# How often the agent looks after its processes.
_LOOK_SECONDS = 0.1
# How long they have to end by themselves after one of them has left by its own choice without their knowing.
_ALONE_SECONDS = 5.0
# How long the processes of this node may go on after another node has ended the run: uploads are closed by then.
_GRACE_SECONDS = 60.0


class Agent(LocalElasticAgent):
    """Starts the processes of a node, and again when one of any node died.

    Args:
        spec: what torchrun would give its agent.
        is_chosen: whether a process of this node has ended with a status of its own choice, which starting again would
            not change.
        is_alone: whether the others don't know of it.
    """

    def __init__(self, spec: WorkerSpec, is_chosen: Callable[[], bool], is_alone: Callable[[], bool]) -> None:
        # Its folder for logs, of which there are none, would stay in the system's when a signal ends the run.
        super().__init__(spec, logs_specs=DefaultLogsSpecs(log_dir=os.environ.get(FOLDER)))
        self._is_chosen, self._is_alone = is_chosen, is_alone
        self._closed_since: float | None = None

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        dead = self._first_dead(worker_group)
        if dead is not None and not self._is_chosen():
            allowed = worker_group.spec.max_restarts
            left = f"; {self._remaining_restarts} of {allowed} restarts left (--restarts)" if allowed else ""
            print(f"rookery: {dead}{left}", file=sys.stderr, flush=True)
            # The others wait for it and have nothing to save. Asked to end they would not hear, for half a minute.
            self._kill()
        elif dead is not None and self._is_alone():
            # So they do here. But where they notice that it is gone they still have to write down how the run ended.
            deadline = time.monotonic() + _ALONE_SECONDS
            while self._have_not_ended() and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)
            self._kill()
        result = super()._monitor_workers(worker_group)
        if result.is_failed() and self._is_chosen():
            self._remaining_restarts = 0
        elif result.state == WorkerState.HEALTHY and worker_group.spec.rdzv_handler.is_closed():
            # Of several nodes: one has given up. Processes that wait for its processes would do so until a time-out.
            now = time.monotonic()
            self._closed_since = self._closed_since or now
            if now - self._closed_since > _GRACE_SECONDS:
                raise RendezvousClosedError
        return result

    def _pids(self) -> list[int]:
        return [] if self._pcontext is None else list(self._pcontext.pids().values())

    def _kill(self) -> None:
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _have_not_ended(self) -> bool:
        for pid in self._pids():
            with suppress(ChildProcessError):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    return True
        return False

    def _first_dead(self, worker_group: WorkerGroup) -> str | None:
        """How a process failed, None if none did; torchrun itself has yet to ask for its status."""
        pids = {} if self._pcontext is None else self._pcontext.pids()
        for local_rank, pid in pids.items():
            with suppress(ChildProcessError):
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is not None and ended.si_status != 0:
                    rank = worker_group.workers[local_rank].global_rank
                    if ended.si_code == os.CLD_EXITED:
                        return f"rank {rank} ended with status {ended.si_status}"
                    return f"rank {rank} was killed by {signal.Signals(ended.si_status).name}"
        return None


def run_agent(
    command: Sequence[str],
    nproc: int,
    meeting: RendezvousParameters,
    restarts: int,
    is_chosen: Callable[[], bool],
    is_alone: Callable[[], bool],
) -> RunResult:
    """Run a command in all processes of this node until they end.

    Args:
        command: program and arguments.
        nproc: processes of this node.
        meeting: how the nodes find each other.
        restarts: how often all are started again at most.
        is_chosen, is_alone: see `Agent`.

    Raises:
        RendezvousError: the nodes did not come together, or another one gave up.
        SignalException: SIGHUP or SIGQUIT.
    """
    handler = get_rendezvous_handler(meeting)
    spec = WorkerSpec(
        role="default",
        local_world_size=nproc,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=handler,
        max_restarts=restarts,
        monitor_interval=_LOOK_SECONDS,
    )
    try:
        return Agent(spec, is_chosen, is_alone).run()
    finally:
        handler.shutdown()
