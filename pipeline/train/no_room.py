"""What to say where a GPU has no room for a step."""

from __future__ import annotations

import torch

from pipeline.train.distributed import World

_ADVICE = (
    "train.accumulate=N trains the same global batch in N times as many micro-batches of that less memory, "
    "train.activation_checkpointing=true keeps fewer activations, eval.batch_size is the evaluation's; "
    "--dry-run counts what a run needs. Nothing that was saved is lost: the same command goes on from there"
)


def no_room(error: torch.OutOfMemoryError, world: World | None) -> str:
    """The message.

    Args:
        error: torch's; its second and third sentence tell what was asked for and what there is.
        world: whose GPU it is, where that is known.
    """
    sentences = str(error).split(". ")
    who = "" if world is None or world.size == 1 else f"rank {world.rank}: "
    return f"{who}the GPU has no room for this. {'. '.join(sentences[1:3])}. {_ADVICE}"
