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

    def fail(self, message: str, status: int = UserError.status, agreed: bool = True) -> NoReturn:
        """Raise a user's mistake that all processes know of, so that only rank 0 prints it.

        Args:
            message: what is wrong, and how to mend it.
            status: exit status.
            agreed: whether they know for sure, having asked each other; else one may have met it alone.
        """
        error = (UserError if self.is_main else PeerError)(message)
        error.status, error.agreed = status, agreed
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

    A process that fails alone does not leave the group but has to end: NCCL takes leave of all
    others together, and these wait for this one in the step that it did not take.

    Raises:
        UserError: some processes have a GPU and others none.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    world = World(rank, size, local_rank, device)
    try:
        _check_devices(world)
        yield world
    except BaseException as error:
        if size == 1 or fails_together(error):
            _leave()
        raise
    _leave()


def fails_together(error: BaseException) -> bool:
    """Whether every process ends for this reason, at the same place; else it may be this one alone."""
    return bool(getattr(error, "agreed", False))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_devices(world: World) -> None:
    """Whether all compute on the same kind of device. Else their first sum would wait until the time-out."""
    kinds = world.gather(world.device.type)
    without = [rank for rank, kind in enumerate(kinds) if kind == "cpu"]
    if 0 < len(without) < world.size:
        ranks = ", ".join(map(str, without[:8])) + (", ..." if len(without) > 8 else "")
        world.fail(
            f"of {world.size} processes {len(without)} see no GPU (rank {ranks}), the others do; look at nvidia-smi "
            "and CUDA_VISIBLE_DEVICES on their nodes, or set CUDA_VISIBLE_DEVICES= (nothing) on all to compute on CPUs"
        )
