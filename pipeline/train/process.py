"""What every worker process does around its job: logging, threads, the process group, the exit status."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import torch

from pipeline.errors import UserError
from pipeline.train.distributed import PeerError, World, open_world


def run_process(job: Callable[[World], object], threads: int | None = None) -> int:
    """Run a job in this process and return its exit status: 0, or 2 for a user's mistake, which is printed once.

    Args:
        job: gets this process's place in the world.
        threads: CPU threads of torch; None leaves torch's default (OMP_NUM_THREADS).
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with open_world() as world:
            job(world)
    except PeerError:
        return 2
    except UserError as error:
        print(f"rookery: {error}", file=sys.stderr, flush=True)
        return 2
    return 0
