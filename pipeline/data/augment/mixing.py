"""Mixup, CutMix and label smoothing of batches, and the loss for the soft targets they give.

A batch is made of lane chunks: the samples that a global step takes of each lane. Partners come from the same chunk and
every number is drawn from (seed, step, lane), so the result for a chunk does not depend on the process that reads it or
on the chunks beside it. What is drawn (`draw_mix`, NumPy) is kept apart from what is done (`apply_mix`, torch on any
device).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, Self

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.data.augment.keyed import Stream, check_partners, chunk_key, generator, uniforms
from pipeline.data.augment.settings import MixConfig
from pipeline.hashing import permutation

__all__ = [
    "MixConfig",
    "MixParams",
    "apply_mix",
    "draw_mix",
    "mix_targets",
    "smooth_one_hot",
    "soft_target_cross_entropy",
]


class MixParams(NamedTuple):
    """How each of B samples is mixed with its partner: result = w * own + (1 - w) * partner, pixel by pixel.

    Attributes:
        partner: (B,) int64, position of the partner in the same batch.
        box: (B, 4) int64, top, bottom, left, right of a box, bottom and right excluded.
        inside: (B,) float32, w inside the box.
        outside: (B,) float32, w outside the box.
        label: (B,) float32, weight of the own label; the partner's is the rest.
        label_smoothing: mass spread over all classes before mixing.
    """

    partner: torch.Tensor
    box: torch.Tensor
    inside: torch.Tensor
    outside: torch.Tensor
    label: torch.Tensor
    label_smoothing: float

    def to(self, device: torch.device) -> Self:
        """The same on `device`; copies from pinned memory do not wait."""
        fields = self._asdict().items()
        return self._replace(**{k: v.to(device, non_blocking=True) for k, v in fields if k != "label_smoothing"})

    def rows(self, part: slice) -> Self:
        """Those samples alone; partners are right only if they are whole chunks."""
        fields = {k: v[part] for k, v in self._asdict().items() if k != "label_smoothing"}
        return self._replace(**fields | {"partner": self.partner[part] - part.start})


class _Chunk(NamedTuple):
    """What is drawn for one chunk, with partners as positions in the chunk."""

    partner: np.ndarray
    box: np.ndarray
    inside: np.ndarray
    outside: np.ndarray
    label: np.ndarray


def draw_mix(config: MixConfig, seed: int, step: int, lanes: Iterable[int], chunk: int, img_size: int) -> MixParams:
    """How the lane chunks of one process are mixed in a global step.

    Args:
        config: what to mix and how.
        seed: seed of the run.
        step: global step.
        lanes: lanes of this process, in the order of their chunks in the batch.
        chunk: samples that a step takes of each lane.
        img_size: side of the images.

    Raises:
        UserError: mixing is on and a chunk has one sample, which has no partner.
    """
    if config.active:
        check_partners(chunk, "mixup and CutMix take", "mix.prob=0")
    chunks = [_draw_chunk(config, chunk_key(seed, step, int(lane)), chunk, img_size) for lane in lanes]
    shifted = [c._replace(partner=c.partner + i * chunk) for i, c in enumerate(chunks)]
    partner, box, inside, outside, label = (np.concatenate(parts) for parts in zip(*shifted, strict=True))
    return MixParams(
        partner=torch.from_numpy(partner),
        box=torch.from_numpy(box),
        inside=torch.from_numpy(inside.astype(np.float32)),
        outside=torch.from_numpy(outside.astype(np.float32)),
        label=torch.from_numpy(label.astype(np.float32)),
        label_smoothing=config.label_smoothing,
    )


def _draw_chunk(config: MixConfig, key: int, chunk: int, img_size: int) -> _Chunk:
    u_mix, u_switch = uniforms(key, Stream.MIX, 2)
    if not config.active or u_mix >= config.prob:
        return _unmixed(chunk)
    both = config.mixup_alpha > 0 and config.cutmix_alpha > 0
    cutmix = u_switch < config.switch_prob if both else config.cutmix_alpha > 0
    if config.mode == "batch":
        return _timm_cutmix(config, key, chunk, img_size) if cutmix else _timm_mixup(config, key, chunk)
    return _nest_cutmix(config, key, chunk, img_size) if cutmix else _nest_mixup(config, key, chunk)


def _unmixed(chunk: int) -> _Chunk:
    own = np.ones(chunk)
    return _Chunk(np.arange(chunk), np.zeros((chunk, 4), np.int64), own, own, own)


def _reversed(chunk: int) -> np.ndarray:
    return np.arange(chunk)[::-1].copy()


def _timm_mixup(config: MixConfig, key: int, chunk: int) -> _Chunk:
    """timm, mode "batch": one weight from Beta(alpha, alpha), the partner is the chunk in reverse order."""
    weight = np.full(chunk, generator(key, Stream.MIX_WEIGHT).beta(config.mixup_alpha, config.mixup_alpha))
    return _unmixed(chunk)._replace(partner=_reversed(chunk), inside=weight, outside=weight, label=weight)


def _timm_cutmix(config: MixConfig, key: int, chunk: int, img_size: int) -> _Chunk:
    """timm, mode "batch": one box pasted from the partner, the label weight corrected to the box cut at the border.

    timm 0.3.2 and 0.4, which the papers trained with, lose a pixel of an odd side; timm 1.0.31 keeps it.
    """
    weight = generator(key, Stream.MIX_WEIGHT).beta(config.cutmix_alpha, config.cutmix_alpha)
    half = int(img_size * math.sqrt(1 - weight)) // 2
    u_y, u_x = uniforms(key, Stream.MIX_BOX, 2)
    top, bottom = _timm_span(int(u_y * img_size), half, img_size)
    left, right = _timm_span(int(u_x * img_size), half, img_size)
    label = 1 - (bottom - top) * (right - left) / img_size**2
    return _Chunk(
        partner=_reversed(chunk),
        box=np.tile(np.array([top, bottom, left, right]), (chunk, 1)),
        inside=np.zeros(chunk),
        outside=np.ones(chunk),
        label=np.full(chunk, label),
    )


def _timm_span(middle: int, half: int, img_size: int) -> tuple[int, int]:
    return max(middle - half, 0), min(middle + half, img_size)


def _nest_weights(config: MixConfig, key: int, alpha: float, chunk: int) -> np.ndarray:
    """(chunk,) weights in [0, 1/2], one per sample: the smaller share of the two pictures."""
    if config.beta == "nest_approx":
        return uniforms(key, Stream.MIX_WEIGHT, chunk) ** (1 / alpha) / 2
    weights = generator(key, Stream.MIX_WEIGHT).beta(alpha, alpha, chunk)
    return np.minimum(weights, 1 - weights)


def _nest_mixup(config: MixConfig, key: int, chunk: int) -> _Chunk:
    """NesT (augment/augment_ops.py, batch_mixup): the own picture has the larger share; partners are shuffled."""
    weight = 1 - _nest_weights(config, key, config.mixup_alpha, chunk)
    partner = permutation(chunk, key, Stream.MIX_PARTNER)
    return _unmixed(chunk)._replace(partner=partner, inside=weight, outside=weight, label=weight)


def _nest_cutmix(config: MixConfig, key: int, chunk: int, img_size: int) -> _Chunk:
    """NesT (batch_cutmix): the own picture stays inside a box of the smaller share; its label is not corrected."""
    weight = _nest_weights(config, key, config.cutmix_alpha, chunk)
    side = (np.sqrt(weight) * img_size).astype(np.int64)
    corner = (uniforms(key, Stream.MIX_BOX, 2 * chunk).reshape(2, chunk) * img_size).astype(np.int64)
    # The modulo keeps the box inside, and is why its last possible place never occurs there.
    top, left = corner % (img_size - side)
    return _Chunk(
        partner=_reversed(chunk),
        box=np.stack([top, top + side, left, left + side], axis=1),
        inside=np.ones(chunk),
        outside=np.zeros(chunk),
        label=weight,
    )


def apply_mix(
    images: torch.Tensor, labels: torch.Tensor, params: MixParams, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix a batch. The inputs are left as they are, and the device is not waited for.

    Args:
        images: (B, C, H, W) float, normalised.
        labels: (B,) int64.
        params: from `draw_mix`, on the device of `images`.
        num_classes: K.

    Returns:
        The mixed images, of the dtype of `images`, and (B, K) float32 targets that sum to 1.
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)[None, :, None]
    columns = torch.arange(width, device=images.device)[None, None, :]
    top, bottom, left, right = params.box[:, :, None, None].unbind(1)
    boxed = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    weight = torch.where(boxed, params.inside[:, None, None], params.outside[:, None, None])[:, None]
    mixed = images * weight + images[params.partner] * (1 - weight)

    one_hot = smooth_one_hot(labels, num_classes, params.label_smoothing)
    return mixed.to(images.dtype), mix_targets(one_hot, params)


def mix_targets(targets: torch.Tensor, params: MixParams) -> torch.Tensor:
    """Targets of mixed samples: (B, ..., K) -> same shape."""
    label = params.label.view(-1, *[1] * (targets.ndim - 1))
    return targets * label + targets[params.partner] * (1 - label)


def smooth_one_hot(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """(B, K) float32: 1 - smoothing + smoothing / K for the label, smoothing / K elsewhere (Szegedy et al. 2016)."""
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)


def soft_target_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of (B, K) logits with (B, K) target distributions, mean over the samples, in float32."""
    return F.cross_entropy(logits.float(), targets.float())
