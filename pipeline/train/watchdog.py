"""The end of a run that hangs: which process keeps the others waiting, and where it is.

Every process notes what it begins. When one has begun nothing new for too long, a thread of it tells the others through
the processes' store, prints the stacks of its own threads, and ends the process, so that all are started again. In a
step all but one process wait for that one; it is the one that is furthest behind, or that does not answer at all.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from threading import Event, Thread
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import torch.distributed as dist

from pipeline.train.distributed import World
from pipeline.train.status import FAILED

T = TypeVar("T")

# How long the others may take to answer; a process that is stopped or swapped out does not.
_ANSWER_SECONDS = 5.0
# A first step compiles, and opens connections.
_FIRST = 3
# What a process does in the course of a step. The one that is furthest behind keeps the others waiting.
_ORDER = ("waits for data", "trains", "logs", "evaluates", "saves")


class Mark(NamedTuple):
    """What a process began last, and when (`time.monotonic`)."""

    step: int
    doing: str
    since: float


class Watchdog:
    """Use as a context manager around the steps.

    Args:
        world: this process among the others.
        minutes: how long a process may take for what it has begun; None: for ever. Three times as long at first.
    """

    def __init__(self, world: World, minutes: float | None) -> None:
        self._world = world
        self._limit = None if minutes is None else 60 * minutes
        self._mark: Mark | None = None
        self._begun = 0
        self._ended = Event()
        self._store = None if world.size == 1 or minutes is None else _own_client()

    def begin(self, step: int, doing: str) -> None:
        """This process now does something else.

        Args:
            step: steps done.
            doing: one of "waits for data", "trains", "logs", "evaluates", "saves".
        """
        self._mark = Mark(step, doing, time.monotonic())
        self._begun += 1

    def over(self, batches: Iterable[T], step: int) -> Iterator[T]:
        """The batches of an evaluation; each is a sign of life."""
        for batch in batches:
            self.begin(step, "evaluates")
            yield batch

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()

    def __enter__(self) -> Self:
        if self._limit is not None:
            Thread(target=self._watch, args=(self._limit,), name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self, limit: float) -> None:
        while not self._ended.wait(min(1.0, limit / 10)):
            mark = self._mark
            allowed = limit * (_FIRST if self._begun <= len(_ORDER) else 1)
            if mark is not None and time.monotonic() - mark.since > allowed:
                self._tell(mark)
                os._exit(FAILED)

    def _tell(self, mark: Mark) -> None:
        """Print what hangs, and where this process is."""
        rank, waited = self._world.rank, time.monotonic() - mark.since
        answers = {rank: mark}
        # A thread, since a store on a process that is stopped keeps its clients waiting.
        asking = Thread(target=self._ask, args=(mark, answers), daemon=True)
        asking.start()
        asking.join(2 * _ANSWER_SECONDS)
        begin = f"nothing has moved for {waited:.0f} s (train.hang_minutes)"
        if asking.is_alive():
            _say(f"{begin}: rank 0, where the processes meet, did not answer")
        elif rank == min(answers):
            _say(f"{begin}: {blame(answers, self._world.size)}")
        _say(f"rank {rank} {mark.doing} in step {mark.step} for {waited:.0f} s; its threads:\n{_stacks()}")
        # The first process that ends takes the others with it; they may still be printing.
        time.sleep(_ANSWER_SECONDS)

    def _ask(self, mark: Mark, answers: dict[int, Mark]) -> None:
        """Add what the other processes began last, of those that find that they hang as well."""
        if self._store is None:
            return
        self._store.set(f"hangs/{self._world.rank}", json.dumps([mark.step, mark.doing]))
        deadline = time.monotonic() + _ANSWER_SECONDS
        while len(answers) < self._world.size and time.monotonic() < deadline:
            for rank in range(self._world.size):
                if rank not in answers and self._store.check([f"hangs/{rank}"]):
                    step, doing = json.loads(self._store.get(f"hangs/{rank}"))
                    answers[rank] = Mark(step, doing, mark.since)
            time.sleep(0.05)


def blame(answers: dict[int, Mark], size: int) -> str:
    """Words that name the processes which keep the others waiting.

    Args:
        answers: what processes began last, by rank; those that are missing did not answer.
        size: number of processes.
    """
    silent = [rank for rank in range(size) if rank not in answers]
    if silent:
        return f"{_ranks(silent)} did not answer"
    places = {rank: (mark.step, _ORDER.index(mark.doing)) for rank, mark in answers.items()}
    step, doing = min(places.values())
    behind = [rank for rank, place in places.items() if place == (step, doing)]
    if len(behind) == size:
        return f"every process {_ORDER[doing]} in step {step}; the stacks tell more"
    return f"the others wait for {_ranks(behind)}: {_ORDER[doing]} in step {step}"


def _ranks(ranks: list[int]) -> str:
    some = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {some}" if len(ranks) == 1 else f"ranks {some}"


def _own_client() -> dist.Store:
    """A connection of the thread's own to the store where the processes met; a shared one may be waiting."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=60)
    )


def _stacks() -> str:
    """Where all threads of this process are."""
    with os.fdopen(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace").rstrip()


def _say(text: str) -> None:
    # In one piece: other processes print at the same moment.
    sys.stderr.flush()
    os.write(sys.stderr.fileno(), f"rookery: {text}\n".encode())
