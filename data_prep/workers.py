"""Worker processes that build shards, and their clean end: after an error, on Ctrl-C, or when the parent is killed."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from data_prep.build import ShardBuilder, ShardTask
from data_prep.errors import UserError
from data_prep.progress import Advance
from data_prep.state import Record

REPORT_SECONDS = 0.2
PR_SET_PDEATHSIG = 1


def build_shards(
    builder: ShardBuilder,
    shards: Sequence[int],
    task_of: Callable[[int], ShardTask],
    workers: int,
    on_images: Advance,
    on_record: Callable[[Record], None],
) -> None:
    """Build these shards, each in one of `workers` processes (in this one if that is 1), in any order.

    `task_of` is asked for a shard's task when its turn comes: the items of a large split together are large.

    Raises:
        UserError: a shard could not be built; the others that were being built are given up.
    """
    if min(workers, len(shards)) <= 1:
        for shard in shards:
            on_record(builder.build(task_of(shard), on_images))
        return
    crew: list[_Worker] = []
    waiting = deque(shards)
    try:
        with _interrupts_held():
            for _ in range(min(workers, len(shards))):
                crew.append(_Worker(builder))
        for worker in crew:
            worker.give(task_of(waiting.popleft()))
        while busy := {worker.connection: worker for worker in crew if worker.task is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                answer = worker.answer()
                if isinstance(answer, int):
                    on_images(answer)
                    continue
                on_record(answer)
                worker.task = None
                if waiting:
                    worker.give(task_of(waiting.popleft()))
    finally:
        for worker in crew:
            worker.end()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait. Processes started meanwhile never see it: it reaches the whole group, but the parent decides."""
    resource_tracker.ensure_running()  # else the first start does it, and lets interrupts through again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, builder: ShardBuilder) -> None:
        # spawn: a fork of a process with threads (a progress bar, pyarrow, a caller's own) can deadlock
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, builder, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()
        self.task: ShardTask | None = None

    def give(self, task: ShardTask) -> None:
        self.task = task
        try:
            self.connection.send(task)
        except BrokenPipeError as error:
            raise self._died() from error

    def answer(self) -> int | Record:
        """The next message: images done since the last one, or the record of the finished shard."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"a worker failed while it made {self.task and self.task.file}:\n{answer}")
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _died(self) -> UserError:
        self.process.join(timeout=1)
        shard = self.task.file if self.task else "nothing"
        return UserError(
            f"a worker process ended with status {self.process.exitcode} while it made {shard} (-9 is most often a "
            "lack of memory: take fewer --workers); run the same command again, the finished shards are kept"
        )


def _work(connection: Connection, builder: ShardBuilder, parent: int) -> None:
    """The life of a worker process: one task after the other until the parent kills it or dies."""
    _die_with(parent)
    while True:
        try:
            task: ShardTask = connection.recv()
        except EOFError:
            return
        try:
            counter = _Counter(connection)
            record = builder.build(task, counter.add)
            counter.flush()
            connection.send(record)
        except UserError as error:
            connection.send(error)
        except Exception:
            connection.send(traceback.format_exc())


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent dies, so that no orphan writes beside the next start."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class _Counter:
    """Reports images a few times a second rather than one by one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._images = 0
        self._sent = time.monotonic()

    def add(self, images: int) -> None:
        self._images += images
        if time.monotonic() - self._sent >= REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._connection.send(self._images)
        self._images = 0
        self._sent = time.monotonic()
