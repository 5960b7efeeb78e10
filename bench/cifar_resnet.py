"""A ResNet-18 for 32 px on the pictures and in the order of a recipe: what is known to be possible on CIFAR-10.

He et al., "Deep Residual Learning for Image Recognition", 2016, arXiv 1512.03385, in the form that is usual for CIFAR:
the first convolution 3x3 without stride, no pooling behind it (11,173,962 parameters with 10 classes). Trained by SGD
with Nesterov's momentum, which suits it, rather than by the recipe's AdamW.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.data.augment.mixing import apply_mix, soft_target_cross_entropy
from pipeline.data.shards import ShardSet
from pipeline.hashing import seed64
from pipeline.resolve import resolve
from pipeline.train.distributed import World
from pipeline.train.evaluate import evaluate
from pipeline.train.setup import device_batches, eval_batches

_LR, _DECAY, _MOMENTUM = 0.1, 5e-4, 0.9  # the rate of 128 images a step


def train_resnet(config: RunConfig, width: int, told: Callable[[str], None]) -> dict[str, Any]:
    """Train from scratch to the end; warm-up and half a cosine of the recipe's lengths.

    Args:
        config: data, augmentation, mixing, order, batch, epochs and intervals; its model and optimizer are not used.
        width: channels of the first stage.

    Returns:
        `top1`, `wall_seconds`, and `curve`: (epoch, minutes, top-1) of every evaluation.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(rank=0, size=1, local_rank=0, device=device)
    run = resolve(config, 1)
    config, plan = run.config, run.plan
    torch.manual_seed(seed64(config.seed, 120))
    model = resnet18(run.train.num_classes, width).to(device, memory_format=torch.channels_last)
    peak = _LR * config.train.global_batch_size / 128
    optimizer = torch.optim.SGD(model.parameters(), peak, _MOMENTUM, weight_decay=_DECAY, nesterov=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
    began, curve = time.monotonic(), []
    validation = eval_batches(config, world)
    for step, batch in enumerate(device_batches(run, ShardSet(config.data.train), world, 0)):
        optimizer.param_groups[0]["lr"] = run.schedule.lr(step) / run.peak_lr * peak
        images, targets = apply_mix(batch.images, batch.labels.to(device), batch.mix.to(device), run.train.num_classes)
        with autocast:
            logits = model(images.contiguous(memory_format=torch.channels_last))
        soft_target_cross_entropy(logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if plan.evaluates(step + 1):
            figures, _ = evaluate(model, validation, autocast, world)
            curve.append([plan.epoch(step + 1), (time.monotonic() - began) / 60, figures["top1"]])
            told(f"{config.name}: epoch {curve[-1][0]:.1f}, {curve[-1][1]:.2f} minutes, top-1 {figures['top1']:.4f}")
    return {"top1": curve[-1][2], "wall_seconds": time.monotonic() - began, "curve": curve}


def resnet18(num_classes: int, width: int = 64) -> nn.Module:
    """timm's, with the first convolution and the pooling behind it replaced."""
    from timm.models.resnet import BasicBlock, ResNet

    channels = tuple(width * 2**stage for stage in range(4))
    model: Any = ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, channels=channels, stem_width=width)
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
