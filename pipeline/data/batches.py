"""Loader processes: batches prepared ahead of the training process, in order, and a clean end for both."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.data.fast import COMPILED
from pipeline.data.ring import InSlot, Receiver, Sender
from pipeline.data.take_ahead import take_ahead
from pipeline.errors import Unreachable, UserError

# What every loader process would import for seconds: the server that they are forked from does it once. The plain
# path's torchvision and timm are not among it: it is for comparisons, and they would slow the start of every other run.
_PRELOAD = ["pipeline.data.loader", *COMPILED, "simplejpeg"]
# Every tensor from a loader process costs a handshake of 0.4 ms here; up to this many bytes, to send it is cheaper.
_SENT_BYTES = 2**18


class Failed(NamedTuple):
    """A `UserError` on its way out of a loader process, which would otherwise arrive wrapped in a traceback."""

    message: str
    may_pass: bool = False

    @classmethod
    def of(cls, error: UserError) -> Failed:
        return cls(str(error), isinstance(error, Unreachable))


class Batches:
    """Iterates a dataset of batches over a range, through loader processes; can be iterated again.

    Args:
        dataset: maps a position to a batch.
        positions: which batches, in order.
        workers: loader processes; 0 loads in this process.
        prefetch: batches that each of them prepares ahead.
        device: batches are put into pinned memory for a GPU.
    """

    def __init__(self, dataset: Dataset, positions: range, workers: int, prefetch: int, device: torch.device) -> None:
        options: dict[str, Any] = {}
        if workers:
            # A fork would copy the locks of this process's other threads (tracking, gloo, CUDA) in whatever state they
            # are; the fork server has no other threads.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(_PRELOAD)
            with _deaf():
                _quiet_tracker()
            with _deaf():
                forkserver.ensure_running()  # its imports go on while the caller sets up the rest
            options = {
                "prefetch_factor": prefetch,
                "multiprocessing_context": context,
            }
        self._pin, self._workers, self._prefetch = device.type == "cuda", workers, prefetch
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=positions,
            num_workers=workers,
            collate_fn=_to_be_sent,
            pin_memory=self._pin,
            generator=torch.Generator(),  # the default one belongs to the training step
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        """The batches in order.

        Raises:
            UserError: a sample can't be used, or a loader process died.
        """
        # Of this iteration: what is left of the last one's batches must not free a slot of this one's.
        receiver = Receiver(self._workers, self._prefetch)
        self._loader.worker_init_fn = partial(_start, receiver.number, receiver.used)
        loader = self._begin()
        watch = _Watch(loader) if self._loader.num_workers else None
        batches = self._received(loader)
        is_left = False
        try:
            # For a GPU torch has such a thread itself.
            yield from (take_ahead(batches) if watch and not self._pin else batches)
        except (RuntimeError, EOFError, OSError) as error:
            if not (watch and _is_death(error)):
                raise
            for process in watch.processes:  # some may wait for a lock that a dead one holds
                process.kill()
            raise UserError(
                f"a loader process died, most likely for want of memory ({error or type(error).__name__}); lower "
                "data.workers or data.prefetch, or give the job more memory (in a container also more /dev/shm)"
            ) from error
        except (KeyboardInterrupt, GeneratorExit):
            is_left = True
            raise
        finally:
            if watch:
                watch.stop()
                # Nobody waits for what they do, and one that still starts would miss, aloud, what it shares with this
                # process. For a GPU torch's own thread may be reading what one is writing.
                for process in watch.processes if is_left and not self._pin else ():
                    process.kill()
                loader._shutdown_workers()  # now, and not when the last traceback that knows it is gone
                for process in watch.processes:
                    process.kill()  # one that didn't end when asked

    def _begin(self) -> Any:
        """Start the loader processes: all, or when a signal comes in between none."""
        before = set(multiprocessing.active_children())
        try:
            return iter(self._loader)
        except KeyboardInterrupt:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            raise

    def _received(self, loader: Iterator[Any]) -> Iterator[Any]:
        for _ in range(len(self._loader)):
            batch = next(loader)
            if isinstance(batch, Failed):
                raise (Unreachable if batch.may_pass else UserError)(batch.message)
            yield _map(batch, self._tensor)

    def _tensor(self, value: Any) -> Any:
        if isinstance(value, InSlot):
            tensor = value.tensor()
        elif isinstance(value, np.ndarray):
            tensor = torch.from_numpy(value)
        else:
            return value
        return tensor.pin_memory() if self._pin else tensor


class _Watch:
    """Ends the wait for a batch that will never be complete.

    A loader process killed while it sends a batch leaves the trainer in a read that no time limit covers, and the other
    loader processes without the lock to send theirs. torch notices only the death of its own children, and loader
    processes are children of the fork server. So when one ends too early, the others are ended as well and the
    trainer's own writing end of their pipe is closed: the read then fails.
    """

    def __init__(self, loader: Any) -> None:
        self.processes = loader._workers
        _LOADERS.update(self.processes)
        self._pipe = loader._worker_result_queue._writer
        self._stopped, self._stop = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From here on processes may end: the last batch has come."""
        self._stop.close()
        self._thread.join()
        self._stopped.close()

    def _watch(self) -> None:
        if self._stopped in wait([self._stopped, *(process.sentinel for process in self.processes)]):
            return
        for process in self.processes:
            process.kill()
        with open(os.devnull, "wb") as nowhere:  # and not close(): torch may still write to it when it ends
            os.dup2(nowhere.fileno(), self._pipe.fileno())


# Of a loader process.
_sender: Sender | None = None


def empty_to_send(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a part of a batch, with no particular content.

    In a loader process the trainer sees it too, so that nothing is copied when the batch is sent.
    """
    return torch.empty(shape, dtype=dtype) if _sender is None else _sender.empty(shape, dtype)


def _map(batch: Any, leaf: Callable[[Any], Any]) -> Any:
    """A batch of nested named tuples with `leaf` applied to every field."""
    return type(batch)(*(_map(part, leaf) for part in batch)) if isinstance(batch, tuple) else leaf(batch)


def _to_be_sent(batch: Any) -> Any:
    """A batch with numbers of slots, and arrays for small tensors."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        in_slot = _sender.sent(value) if _sender is not None else None
        if in_slot is not None:
            return in_slot
        return value.numpy() if value.nbytes <= _SENT_BYTES else value

    sent = _map(batch, leaf)
    if _sender is not None:
        _sender.drop_rest()
    return sent


def _is_death(error: Exception) -> bool:
    """Whether torch reports that a loader process ended, and not (`Caught ...`) an error that was raised in one."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith(("DataLoader worker (pid", "Pin memory thread exited"))
    return not text.startswith("Caught ")


# Loader processes of this one that may still live.
_LOADERS: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _kill_loaders() -> None:
    """At the end of this process multiprocessing would send them SIGTERM, to which they are deaf, and wait for ever."""
    for process in multiprocessing.active_children():
        if process in _LOADERS:
            process.kill()


@contextmanager
def _deaf() -> Iterator[None]:
    """What is started here, and its children, does not hear the signals that end a run.

    Slurm sends them to every process of a job, but the trainer needs batches until its last step, and ends the loaders
    itself. A block survives the start of another program, where a handler would not.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _quiet_tracker() -> None:
    """Start the process that removes the semaphores of a killed trainer, without the warning it would print then.

    The warning speaks of a leak that this process has just mended. Its filter can only be given at the start.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, "ignore:resource_tracker")))
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _start(receiver: int, used: torch.Tensor, worker: int) -> None:
    global _sender
    _sender = Sender(receiver, worker, used[worker])
    _end_with_the_trainer()


def _end_with_the_trainer() -> None:
    """Make a loader process end when the process it loads for is killed.

    torch's own watch looks at the parent, which here is the fork server, and that waits for its children.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "called in a loader process"

    def follow() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
