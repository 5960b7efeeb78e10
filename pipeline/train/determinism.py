"""Kernels that give the same numbers each time, and the numbers that they are asked for."""

from __future__ import annotations

import os
import sys

import torch


def use_whole_float32() -> None:
    """Convolutions of float32 in float32, for this process.

    Left alone cuDNN rounds what goes into them to the 10 bits of TF32 (Ampere and newer), though products of matrices
    are exact by default: models, gradient penalties and FID would differ from those of a CPU in the third digit.
    """
    torch.backends.cudnn.allow_tf32 = False


def use_deterministic_kernels(wanted: bool) -> None:
    """`train.deterministic`, for this process; before its first step.

    An operation without a deterministic kernel is an error then, and not a warning: where it may only warn, torch's
    fused attention takes the faster backward pass, whose sums come in another order each time.

    torch would fill new memory with NaN as well, so that what is read before it is written shows. Nothing here reads
    such memory, and to fill it is another pass through memory for many tensors.
    """
    if wanted:
        # cuBLAS may add up in another way where several streams share its work memory; so they don't.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # torch.compile would time kernels and take the fastest, which may be another one each time.
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = str(int(wanted))
    inductor = sys.modules.get("torch._inductor.config")
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = wanted  # type: ignore[union-attr]
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
