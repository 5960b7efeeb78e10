"""Saving while training goes on."""

from __future__ import annotations

from dataclasses import replace
from threading import Thread
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.distributed import World
from pipeline.train.engines import Engine


class Saver:
    """Copies the state, and writes, hashes and commits the copy in a thread; one checkpoint at a time.

    Args:
        store: where to.
        world: this process among the others; the threads of all talk in a group of their own.
        asynchronous: else `save` returns when the checkpoint is committed.
    """

    def __init__(self, store: CheckpointStore, world: World, asynchronous: bool) -> None:
        group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._device = world.device
        self._world = replace(world, device=torch.device("cpu"), group=group)
        self._store = store
        self._asynchronous = asynchronous
        self._thread: Thread | None = None
        self._fault: BaseException | None = None

    def save(self, step: int, progress: dict[str, Any], engine: Engine, planned: bool = True) -> None:
        """Save the engine and the loop's progress; collective. See `CheckpointStore.save` and `Engine.snapshot`."""
        self.wait()
        write = engine.snapshot(planned)

        def job() -> None:
            if self._device.type == "cuda":
                # A new thread is on the first GPU, and what asks for its stream there takes memory of another process.
                torch.cuda.set_device(self._device)
            try:
                self._store.save(step, progress, lambda path: write(path, self._world), self._world)
            except BaseException as fault:  # raised again by `wait`
                self._fault = fault

        # A daemon: a process that fails must not be kept from ending by one that waits for it.
        self._thread = Thread(target=job, name=f"save-{step}", daemon=True)
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is committed, or given up with a warning."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait, unless this process failed alone: the others might be waiting for it."""
        if kind is None or issubclass(kind, UserError):
            self.wait()
