"""What to say where a GPU has no room for a step."""

from __future__ import annotations

from pipeline.train.distributed import World

_ADVICE = (
    "Give it fewer samples at a time: a training by train.accumulate=N, the same global batch in smaller micro-batches "
    "(or train.activation_checkpointing=true; --dry-run counts what it needs), an evaluation by eval.batch_size or "
    "--batch-size, a benchmark by --batch, explanations by fewer pictures. "
    "A training goes on from its newest checkpoint"
)


def no_picture(error: BaseException) -> str:
    """Why nothing was drawn, in a few words; what is given up then costs the training nothing."""
    return f"no memory for it ({str(error).partition('. If ')[0] or type(error).__name__})"


def no_room(error: RuntimeError, world: World | None = None) -> str:
    """The message.

    Args:
        error: torch's OutOfMemoryError; its second and third sentence tell what was asked for and what there is.
        world: whose GPU it is, where that is known.
    """
    sentences = str(error).split(". ")
    who = "" if world is None or world.size == 1 else f"rank {world.rank}: "
    return f"{who}the GPU has no room for this. {'. '.join(sentences[1:3])}. {_ADVICE}"
