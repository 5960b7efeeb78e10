"""This process among the others: rank, device, and the few collectives the loop needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from pipeline.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Where this process stands.

    Attributes:
        rank: 0 ... size - 1; rank 0 writes files and logs.
        size: number of processes.
        local_rank: rank on this host.
        device: the device this process computes on.
        group: whom the collectives are with; None: all.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self.group)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; collective."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def gather(self, item: T) -> list[T]:
        """A (picklable) object of every process, in the order of ranks; collective."""
        items: list[Any] = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(items, item, group=self.group)
        return items

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 and hand its (picklable) result to every process; collective.

        Raises:
            UserError: rank 0 raised it. Elsewhere it comes as `PeerError`, so that the message is printed once.
        """
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = work()
            except UserError as error:
                box[1] = str(error), error.status
        dist.broadcast_object_list(box, src=0, device=self.device, group=self.group)
        if box[1] is not None:
            self.fail(*box[1])
        return box[0]

    def fail(self, message: str, status: int = UserError.status) -> NoReturn:
        """Raise a user's mistake that all processes know of, so that only rank 0 prints it."""
        error = (UserError if self.is_main else PeerError)(message)
        error.status = status
        if self.is_main and self.size > 1:
            # Now: the others leave, and their launcher ends this process while it closes what is open.
            print(f"rookery: {error}", file=sys.stderr, flush=True)
            error.told = True
        raise error


class PeerError(UserError):
    """Rank 0 met a user's mistake and tells of it; this process only has to leave."""


@contextmanager
def open_world(timeout_minutes: float = 30) -> Iterator[World]:
    """Join the process group that torchrun's environment describes; without one, a world of one process.

    The device is this process's GPU where there is one (NCCL), else the CPU (gloo).
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        yield World(rank, size, local_rank, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
