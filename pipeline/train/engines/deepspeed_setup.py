"""DeepSpeed's config, made from ours, and its import."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

from pipeline.config import RunConfig
from pipeline.models.layers import EncoderLayer
from pipeline.train.distributed import World

# Gradients are averaged, and weights gathered, in pieces of this many elements (32 MB).
BUCKET = 2**23
# ZeRO 3 leaves smaller parameters whole: biases and norms, which cost more to gather than to keep.
SMALL = 4096


def deepspeed_config(config: RunConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's own config for a run; nobody writes it by hand.

    Micro-batches are counted and gradients divided by the loop, so DeepSpeed is told of none to accumulate.
    """
    on_gpu = world.device.type == "cuda"
    stage = config.engine.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": SMALL,
    }
    if config.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": config.train.global_batch_size // world.size // config.train.accumulate,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if stage == 0 else config.train.clip_grad_norm or 0.0,
        "zero_optimization": zero,
        # Its own Adam for the CPU is compiled at the first start; torch's fused one needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
    }


def import_deepspeed(config: RunConfig, world: World) -> Any:
    """The deepspeed package, silent, and without what it would compile.

    Raises:
        UserError: it is not installed, or a version that computes something else, see `_check_versions`.
    """
    # It would look for a GPU by itself, and print what it found.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    # Its tuner, of no use here, imports MLflow where it finds it. That takes several seconds on every process.
    blocked = "mlflow" not in sys.modules and not (world.is_main and config.tracking.mlflow)
    if blocked:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    except ImportError:
        world.fail(
            "engine.name=deepspeed needs the deepspeed package; install it with: pip install 'rookery[deepspeed]'",
            agreed=False,
        )
    finally:
        if blocked:
            del sys.modules["mlflow"]
    _check_versions(TorchVersion(deepspeed.__version__), config, world)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its shared-memory collectives for CPUs are compiled at the first start; torch's gloo needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def gather_whole(model: nn.Module) -> None:
    """Have ZeRO 3 gather the layers of `kernels=triton` as a whole, before DeepSpeed gets the model.

    They take the weights of their parts without a call of these, around which it gathers otherwise. It would notice,
    but not while a compiler reads the code: there are no weights then.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(module, EncoderLayer) and module.fused:
            set_z3_leaf_module(module, True)


def _check_versions(deepspeed: TorchVersion, config: RunConfig, world: World) -> None:
    """Refuse what was seen to train otherwise than `tests/train/test_engines.py` demands, without a word."""
    if deepspeed < "0.19.8":
        world.fail(
            f"engine.name=deepspeed: DeepSpeed {deepspeed} is too old, in 0.19.0 a step whose gradient is no number is "
            "taken; install a newer one with: pip install 'rookery[deepspeed]'",
            agreed=False,
        )
    if config.engine.zero_stage == 3 and config.train.compile and torch.__version__ < "2.15":
        world.fail(
            f"train.compile with engine.zero_stage=3: PyTorch {torch.__version__} is too old, 2.11 computes other "
            "gradients; install 2.15 or newer, or set train.compile=false",
            agreed=False,
        )
