"""BatchNorm whose statistics don't depend on how a batch is spread over processes and micro-batches.

Torch's own takes them over whatever part of a batch one process sees at a time. Here they are taken over groups of a
fixed number of consecutive samples, as the authors of Refiner took them over the 32 samples of a GPU, and the running
averages follow the mean over all groups of a global step. Without an engine that sets this up it is torch's BatchNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pipeline.models.errors import ModelError


class BatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d, with statistics per group of samples once `group_statistics` was called.

    Attributes:
        group: samples of a group; None: torch's behaviour.
        pending: (2, C), sums over the groups seen since the last `update_running` of their means and variances.
        groups_seen: how many these were, 0-D.
    """

    pending: Tensor
    groups_seen: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps=eps)
        self.group: int | None = None
        self.register_buffer("pending", torch.zeros(2, num_features), persistent=False)
        self.register_buffer("groups_seen", torch.zeros(()), persistent=False)

    def forward(self, input: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> same shape.

        Args:
            real: (B, 1, H, W), 1 where statistics are taken and 0 where not; None: they are taken everywhere.
        """
        if self.training and real is not None:
            return self._over_real(input, real)
        if not self.training or self.group is None:
            return super().forward(input)
        if len(input) % self.group:
            raise ModelError(f"{len(input)} samples can't be cut into groups of {self.group} for BatchNorm")
        parts, means, inverses = zip(
            *(
                torch.native_batch_norm(part, self.weight, self.bias, None, None, True, 0.0, self.eps)
                for part in input.split(self.group)
            ),
            strict=True,
        )
        variances = torch.stack(inverses).detach().float() ** -2 - self.eps
        self._add(torch.stack(means).detach().float(), variances, parts[0].numel() / parts[0].shape[1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def _add(self, mean: Tensor, variance: Tensor, count: float | Tensor) -> None:
        """Statistics of G groups of `count` values a channel each, (G, C)."""
        # The running variance is the unbiased one, as torch has it.
        self.pending.add_(torch.stack([mean, variance * (count / (count - 1))]).sum(1))
        self.groups_seen.add_(len(mean))

    def _over_real(self, input: Tensor, real: Tensor) -> Tensor:
        """Training with statistics over a part of the places; without groups the running averages move at once."""
        if len(input) % (self.group or len(input)):
            raise ModelError(f"{len(input)} samples can't be cut into groups of {self.group} for BatchNorm")
        groups = (-1, self.group or len(input))
        x, weight = input.float().unflatten(0, groups), real.float().unflatten(0, groups)
        n = weight.sum((1, 2, 3, 4), keepdim=True)
        mean = (x * weight).sum((1, 3, 4), keepdim=True) / n
        var = ((x - mean).square() * weight).sum((1, 3, 4), keepdim=True) / n
        with torch.no_grad():
            both = torch.stack([mean.squeeze((1, 3, 4)), (var * n / (n - 1)).squeeze((1, 3, 4))])
            self.pending.add_(both.sum(1))
            self.groups_seen.add_(both.shape[1])
        if self.group is None:
            self.update_running(torch.zeros((), device=input.device))
        scale, shift = (t.view(-1, 1, 1) for t in (self.weight, self.bias))
        return ((x - mean) * torch.rsqrt(var + self.eps) * scale + shift).flatten(0, 1).to(input.dtype)

    @torch.no_grad()
    def update_running(self, skipped: Tensor) -> None:
        """Move the running averages by what is pending, unless `skipped` is 1; then nothing is pending any more."""
        _update_running([self], skipped)


def group_statistics(model: nn.Module, group: int) -> list[BatchNorm2d]:
    """Take statistics over `group` samples from now on; returns the model's BatchNorms, none if it has none.

    The caller then calls `update_groups` after each step.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm2d)]
    for norm in norms:
        norm.group = group
    return norms


@torch.no_grad()
def note_groups(norms: Sequence[BatchNorm2d], statistics: Tensor, count: float | Tensor) -> None:
    """Take note of the statistics of G groups that were used elsewhere; without groups it is the whole batch.

    Args:
        norms: that have as many groups.
        statistics: mean and biased variance of each in turn, (G, sum of 2 C).
        count: of the values of each channel.
    """
    # Of all at once, as in `_update_running`.
    sizes = [norm.num_features for norm in norms for _ in range(2)]
    means_and_variances = statistics.detach().sum(0).split(sizes)
    torch._foreach_mul_(means_and_variances[1::2], count / (count - 1))
    torch._foreach_add_([row for norm in norms for row in norm.pending.unbind()], means_and_variances)
    torch._foreach_add_([norm.groups_seen for norm in norms], len(statistics))
    if norms[0].group is None:
        _update_running(norms, torch.zeros((), device=statistics.device))


def update_groups(norms: list[BatchNorm2d], skipped: Tensor, total: Callable[[Tensor], None] | None) -> None:
    """Move all running averages after a global step.

    Args:
        norms: from `group_statistics`.
        skipped: 1 if the step was skipped, else 0; 0-D.
        total: sums a tensor over the processes in place; None with one process.
    """
    if total is not None and norms:
        # One sum for all: a step has dozens of these small tensors.
        sums = torch.cat([t.flatten() for norm in norms for t in (norm.pending, norm.groups_seen)])
        total(sums)
        for norm in norms:
            size = norm.pending.numel()
            norm.pending.copy_(sums[:size].view_as(norm.pending))
            norm.groups_seen.copy_(sums[size])
            sums = sums[size + 1 :]
    if norms:
        _update_running(norms, skipped)


@torch.no_grad()
def _update_running(norms: Sequence[BatchNorm2d], skipped: Tensor) -> None:
    """`update_running` of many at once: these are dozens of small tensors, and a GPU is told of each operation."""
    running = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]
    new = torch.cat([(norm.pending / norm.groups_seen).flatten() for norm in norms]).to(running[0].dtype)
    weight = _momentum(norms) * (1 - skipped)
    before = torch.cat(running)
    moved = torch.where(weight > 0, torch.lerp(before, new, weight), before)
    torch._foreach_copy_(running, moved.split([len(tensor) for tensor in running]))
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    # A list: a single tensor would be read by the host.
    torch._foreach_add_(counts, [(1 - skipped).long()] * len(counts))
    torch._foreach_zero_([tensor for norm in norms for tensor in (norm.pending, norm.groups_seen)])


def _momentum(norms: Sequence[BatchNorm2d]) -> float:
    [momentum] = {norm.momentum for norm in norms}
    assert momentum is not None, "no cumulative averages here"
    return momentum
