"""Memory that a loader process fills again and again and the trainer reads in place.

A new piece of shared memory for every batch costs both sides a page fault for each of its pages, which takes longer
than filling it, and a handshake between the two processes, for which the loader must interrupt its work. So each loader
process keeps as many pieces as batches are under way. A piece is handed over once; from then on its number is enough.
The trainer's tensor lies in it, and when the last reference to that is gone, a flag says that it may be filled again.
"""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Batches that the trainer may hold besides those that are prepared ahead (the last two that it used, two that are taken
# ahead); with more, memory is new again.
_HELD = 4


@dataclass(frozen=True, slots=True)
class InSlot:
    """What is sent for a tensor that lies in a slot.

    Attributes:
        receiver: number of the one that it is for.
        worker, slot: whose, and which of its slots.
        shape, stride, dtype: of the tensor, which starts where the slot does.
        memory: the slot, as bytes; None where the trainer has it already.
    """

    receiver: int
    worker: int
    slot: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    memory: torch.Tensor | None

    def tensor(self) -> torch.Tensor:
        """The tensor, in place. With its storage the slot becomes free."""
        return _receivers[self.receiver].tensor(self)

    def pin_memory(self) -> torch.Tensor:
        """A copy for a GPU; torch's thread that makes such copies calls this. The slot is free at once."""
        return self.tensor().pin_memory()


class Sender:
    """A loader process's slots.

    Args:
        receiver: number of the one that they are for.
        worker: number of this process.
        used: (slots,) uint8 in shared memory, 1 from when a slot is filled until the trainer has done with it.
    """

    def __init__(self, receiver: int, worker: int, used: torch.Tensor) -> None:
        self._receiver, self._worker, self._used = receiver, worker, used.numpy()
        self._slots: list[torch.Tensor | None] = [None] * len(used)
        self._known: set[int] = set()
        self._taken: dict[int, int] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a part of a batch, with no particular content."""
        size = math.prod(shape) * dtype.itemsize
        for slot in np.flatnonzero(self._used == 0).tolist():
            memory = self._slots[slot]
            if memory is None or memory.nbytes != size:
                self._slots[slot] = memory = _shared(size)
                self._known.discard(slot)
            self._used[slot] = 1
            self._taken[memory.data_ptr()] = slot
            return memory.view(dtype).view(shape)
        return _shared(size).view(dtype).view(shape)

    def sent(self, value: torch.Tensor) -> InSlot | None:
        """What to send for a tensor that starts where the memory of an `empty` did; None: it does not."""
        slot = self._taken.pop(value.data_ptr(), None)
        if slot is None:
            return None
        memory = None if slot in self._known else self._slots[slot]
        self._known.add(slot)
        return InSlot(self._receiver, self._worker, slot, tuple(value.shape), value.stride(), value.dtype, memory)

    def drop_rest(self) -> None:
        """What was taken for this batch and not sent with it is free again."""
        for slot in self._taken.values():
            self._used[slot] = 0
        self._taken.clear()


class Receiver:
    """The trainer's side.

    Args:
        workers: loader processes.
        prefetch: batches that each of them prepares ahead.

    Attributes:
        number: its own in this process.
        used: (workers, slots) uint8, see `Sender`.
    """

    def __init__(self, workers: int, prefetch: int) -> None:
        self.number = next(_numbers)
        _receivers[self.number] = self
        self.used = torch.zeros((workers, prefetch + _HELD), dtype=torch.uint8).share_memory_()
        self._flags = self.used.numpy()
        self._slots: dict[tuple[int, int], np.ndarray] = {}

    def tensor(self, sent: InSlot) -> torch.Tensor:
        """See `InSlot`."""
        key = (sent.worker, sent.slot)
        if sent.memory is not None:
            self._slots[key] = sent.memory.numpy()
        seen = self._slots[key].view()  # an object of its own, which lives as long as the tensor's storage
        weakref.finalize(seen, _free, self._flags, key).atexit = False
        return torch.from_numpy(seen).view(sent.dtype).as_strided(sent.shape, sent.stride)


_numbers = itertools.count()
_receivers: weakref.WeakValueDictionary[int, Receiver] = weakref.WeakValueDictionary()


def _free(flags: np.ndarray, key: tuple[int, int]) -> None:
    flags[key] = 0


def _shared(size: int) -> torch.Tensor:
    storage: Any = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
