"""Leaving the process group that an engine opened in a test's own process."""

from __future__ import annotations

import sys

import torch.distributed as dist


def leave_process_group() -> None:
    """So that another test can open one: DeepSpeed keeps a copy of the group, with which it could do nothing then."""
    if dist.is_initialized():
        dist.destroy_process_group()
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        groups._WORLD_GROUP = None
