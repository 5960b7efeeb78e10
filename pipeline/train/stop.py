"""Being asked to stop: a signal on any process ends the run on all of them, after a checkpoint.

SIGINT (Ctrl-C) and SIGTERM (`kill`, a scheduler's preemption) end it with status 130, SIGUSR1 (Slurm's notice before
the time limit) with status 75, which tells a job script to submit the same again; so does the clock, when a Slurm
job's time is nearly over. A second SIGINT ends it at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from pipeline.train.distributed import World
from pipeline.train.status import INTERRUPTED, RESUBMIT

STATUS: dict[int, int] = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: INTERRUPTED, signal.SIGUSR1: RESUBMIT}

# A process may get one signal twice: from the scheduler and from the agent that passes its own on.
_ECHO_SECONDS = 1.0


class Stopped(KeyboardInterrupt):
    """The run ends because a signal asked for it.

    Attributes:
        status: exit status of the process.
        agreed: whether all processes end, after the same step.
    """

    def __init__(self, status: int = INTERRUPTED, agreed: bool = False) -> None:
        super().__init__()
        self.status = status
        self.agreed = agreed


def catch_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler for the signals of `STATUS`, but for those that are ignored, as under `nohup`.

    Returns:
        The handlers before.
    """
    caught = [number for number in STATUS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in caught}


def stop_now(number: int, frame: FrameType | None = None) -> None:
    """Signal handler outside the training steps, where there is nothing to save."""
    raise Stopped(STATUS[number])


class StopRequest:
    """What the signals and clocks of all processes ask for. Use `listening`.

    Every step the processes tell each other what they were asked. The sum travels while the next step is computed, so
    nobody waits for it; it decides one step later, on all processes alike.

    Args:
        world: this process among the others.
        leave_at: Unix time from which on this process asks to be submitted again; may differ between processes.
    """

    def __init__(self, world: World, leave_at: float | None = None) -> None:
        self._leave_at = leave_at
        self._asked = 0
        self._since = 0.0
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._work: Any = None
        self._sent = torch.zeros((), dtype=torch.int32)

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler: remember; on a second Ctrl-C end at once."""
        now = time.monotonic()
        if self._asked and number == signal.SIGINT and now - self._since > _ECHO_SECONDS:
            raise Stopped
        self._since = self._since if self._asked else now
        self._asked = max(self._asked, 1 if STATUS[number] == INTERRUPTED else 2)

    def decided(self) -> int | None:
        """Exit status if the run is to end after this step, on all processes alike, else None; collective."""
        if self._leave_at is not None and time.time() >= self._leave_at:
            self._asked = 2
        if self._group is None:
            return _status(self._asked)
        answer = self._wait()
        self._sent = torch.tensor(self._asked, dtype=torch.int32)
        self._work = dist.all_reduce(self._sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return _status(answer)

    def _wait(self) -> int:
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._sent)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals while training; what was there before is put back."""
        before = catch_signals(self.note)
        try:
            yield
            self._wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _status(asked: int) -> int | None:
    return {0: None, 1: INTERRUPTED, 2: RESUBMIT}[asked]
