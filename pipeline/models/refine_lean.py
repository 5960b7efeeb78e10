"""The released refiner trained with two maps per head kept in place of twenty.

`OfficialRefiner` keeps every intermediate of its operations for the backward pass, most of them as wide as the expanded
maps. Here its input and its reduced maps are kept. The expanded maps are computed again in the backward pass, a few
samples at a time, so that those of a whole batch never exist at once, in neither pass.

BatchNorm couples the samples, so slices can't be recomputed one by one as layers are:

* The statistics of the expanded maps need none of them: E = W A has mean W mean(A) and variance diag(W Cov(A) Wᵀ), from
  the H x H covariance of the input. The gradient through these statistics is linear in A.
* Those of the convolved maps take a pass over the slices, and so do their sums in the backward pass. All else works on
  maps of one per head.

Shapes: B samples, H heads, H' expanded maps, N tokens. `real` (B, 1, N, N) is 1 where query and key are tokens and 0
where one is padding, or None. Maps are computed in the type of the input, statistics in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.models.errors import ModelError

if TYPE_CHECKING:
    from pipeline.models.refine import OfficialRefiner

# Elements of the expanded maps of one slice: 64 MB in half precision.
SLICE = 2**25


def refine_lean(refiner: OfficialRefiner, maps: Tensor, real: Tensor | None) -> Tensor:
    """What `refiner(maps, real)` gives in training, its running statistics included: (B, H, N, N) -> same shape.

    Raises:
        ModelError: the batch can't be cut into the groups of the BatchNorms.
    """
    norms = (refiner.bn1, refiner.bn2, refiner.bn3, refiner.adapt_bn)
    group = norms[0].group or len(maps)
    if len(maps) % group:
        raise ModelError(f"{len(maps)} samples can't be cut into groups of {group} for BatchNorm")
    device = maps.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        maps = maps.to(torch.get_autocast_dtype(device))
    convs = (refiner.expand, refiner.local, refiner.reduce)
    parameters = [p for conv, norm in zip(convs, norms, strict=False) for p in (conv.weight, norm.weight, norm.bias)]
    parameters += [norms[3].weight, norms[3].bias]
    refined = []
    for first in range(0, len(maps), group):
        places = None if real is None else real[first : first + group]
        out, count, *statistics = LeanRefiner.apply(
            maps[first : first + group], places, norms[0].eps, refiner.scale, *parameters
        )
        refined.append(out)
        for norm, mean, var in zip(norms, statistics[::2], statistics[1::2], strict=True):
            norm.note(mean, var, count)
    return refined[0] if len(refined) == 1 else torch.cat(refined)


class LeanRefiner(torch.autograd.Function):
    """One group of BatchNorm statistics: (maps, real, epsilon, scale, *parameters) -> refined maps, n, statistics.

    n counts the places of the statistics; these are mean and biased variance of the four BatchNorms, (C,) each. None of
    them has a gradient, and there are no second derivatives.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, real: Tensor | None, eps: float, scale: float, *parameters: Tensor) -> Any:
        with _as_typed(maps):
            group = _Group(maps, real, eps, scale, parameters)
            out, reduced = _forward(group)
        ctx.save_for_backward(maps, real, reduced, group.center, group.covariance, *group.statistics, *parameters)
        ctx.eps, ctx.scale = eps, scale
        ctx.mark_non_differentiable(group.count, *group.statistics)
        return out, group.count, *group.statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        maps, real, reduced, center, covariance, *rest = ctx.saved_tensors
        statistics, parameters = rest[:8], rest[8:]
        with _as_typed(maps):
            group = _Group(maps, real, ctx.eps, ctx.scale, parameters)
            group.center, group.covariance = center, covariance
            for mean, var in zip(statistics[::2], statistics[1::2], strict=True):
                group.learn(mean, var)
            grad_maps, grads = _backward(group, reduced, grad)
        return grad_maps, None, None, None, *(g.view_as(p).to(p.dtype) for g, p in zip(grads, parameters, strict=True))


class _Norm(NamedTuple):
    """A BatchNorm with known statistics, all (C,): x -> weight · (x - mean) · inv + bias."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    inv: Tensor

    @property
    def scale(self) -> Tensor:
        """Of the whole, (C,)."""
        return self.weight * self.inv

    def __call__(self, x: Tensor) -> Tensor:
        """(b, C, N, N) -> same shape, at least float32."""
        return self.affine(self.normal(x))

    def normal(self, x: Tensor) -> Tensor:
        """Without weight and bias."""
        return (_accurate(x) - _wide(self.mean)) * _wide(self.inv)

    def affine(self, normal: Tensor) -> Tensor:
        """The rest."""
        return normal * _wide(self.weight) + _wide(self.bias)

    def backward(self, grad: Tensor, normal: Tensor, sums: Tensor, count: Tensor) -> Tensor:
        """Gradient of x, from that of the output, `normal(x)`, and the sums of `grad` and `grad · normal`, (2, C)."""
        means = sums / count
        return (grad - _wide(means[0]) - normal * _wide(means[1])) * _wide(self.scale)


class _Group:
    """The maps of one group, and what is known of them: statistics are learnt one after the other.

    Attributes:
        slices: of samples.
        count: places of the statistics, 0-D.
        center, covariance: (H,) and (H, H), of the maps.
        statistics: mean and variance of each BatchNorm, as far as known.
        norms: the BatchNorms with these.
    """

    def __init__(
        self, maps: Tensor, real: Tensor | None, eps: float, scale: float, parameters: Sequence[Tensor]
    ) -> None:
        self.maps, self.real, self.eps, self.scale = maps, real, eps, scale
        expand, weight1, bias1, kernel, weight2, bias2, reduce, weight3, bias3, weight4, bias4 = map(
            _accurate, parameters
        )
        self.expand, self.kernel, self.reduce = expand.flatten(1), kernel, reduce.flatten(1)
        self._affine = ((weight1, bias1), (weight2, bias2), (weight3, bias3), (weight4, bias4))
        step = max(1, SLICE // (len(expand) * maps[0, 0].numel()))
        self.slices = [slice(i, min(i + step, len(maps))) for i in range(0, len(maps), step)]
        everywhere = expand.new_full((), maps[:, 0].numel())
        self.count = everywhere if real is None else real.sum(dtype=expand.dtype)
        self.center = self.covariance = everywhere  # until they are known
        self.statistics: list[Tensor] = []
        self.norms: list[_Norm] = []

    def learn(self, mean: Tensor, var: Tensor) -> None:
        """Take note of the statistics of the next BatchNorm."""
        self.norms.append(_Norm(*self._affine[len(self.norms)], mean, torch.rsqrt(var + self.eps)))
        self.statistics += [mean, var]

    def masked(self, x: Tensor, part: slice) -> Tensor:
        """0 where padding is."""
        return x if self.real is None else x * self.real[part]

    def moments(self, values: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, (C,) each, of values (b, C, N, N) that come slice by slice."""
        shares, means, variances = [], [], []
        for part, x in zip(self.slices, map(_accurate, values), strict=True):
            if self.real is None:
                share = x[:, 0].numel() / self.count
                var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            else:
                n = self.real[part].sum(dtype=x.dtype)
                share = n / self.count
                mean = self.masked(x, part).sum((0, 2, 3)) / n
                var = self.masked((x - _wide(mean)).square(), part).sum((0, 2, 3)) / n
            shares.append(share)
            means.append(mean)
            variances.append(var)
        of_all = _total(share * mean for share, mean in zip(shares, means, strict=True))
        spread = (v + (mean - of_all).square() for v, mean in zip(variances, means, strict=True))
        return of_all, _total(share * v for share, v in zip(shares, spread, strict=True))

    def centered(self, part: slice) -> Tensor:
        """The maps less their means, (b, H, N, N): half precision has few digits for differences of large numbers."""
        return self.masked(_accurate(self.maps[part]) - _wide(self.center), part).to(self.maps.dtype)

    def expanded(self, centered: Tensor) -> Tensor:
        """What goes into the first ReLU6, (b, H', N, N)."""
        first = self.norms[0]
        kernel = first.scale[:, None] * self.expand
        return F.conv2d(centered, kernel.to(centered.dtype)[..., None, None], first.bias.to(centered.dtype))

    def local(self, expanded: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """The first ReLU6, and the local convolution of it: (b, H', N, N) each."""
        hidden = self.masked(F.relu6(expanded), part)
        kernel = self.kernel.to(hidden.dtype)
        return hidden, F.conv2d(hidden, kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))

    def summed(self, reduced: Tensor, part: slice) -> Tensor:
        """What goes into the last BatchNorm, (b, H, N, N)."""
        return self.norms[2](reduced[part]) + self.maps[part]


def _forward(group: _Group) -> tuple[Tensor, Tensor]:
    """Refined and reduced maps; the group learns its statistics."""
    maps, dtype, slices = group.maps, group.maps.dtype, group.slices
    group.center, _ = group.moments(group.masked(maps[part], part) for part in slices)
    flat = (group.masked(_accurate(maps[part]) - _wide(group.center), part) for part in slices)
    group.covariance = _total(_outer(x, x) for x in flat) / group.count
    matrix = group.expand
    group.learn(matrix @ group.center, ((matrix @ group.covariance) * matrix).sum(1).clamp(min=0))

    def convolved(part: slice) -> Tensor:
        return group.local(group.expanded(group.centered(part)), part)[1]

    group.learn(*group.moments(convolved(part) for part in slices))
    reduced = torch.empty_like(maps, memory_format=torch.contiguous_format)
    for part in slices:
        hidden = F.relu6(group.norms[1](convolved(part))).to(dtype)
        reduced[part] = F.conv2d(hidden, group.reduce.to(dtype)[..., None, None])
    group.learn(*group.moments(reduced[part] for part in slices))
    group.learn(*group.moments(group.summed(reduced, part) for part in slices))
    out = torch.empty_like(reduced)
    for part in slices:
        out[part] = group.masked(group.norms[3](group.summed(reduced, part)) * group.scale, part)
    return out, reduced


def _backward(group: _Group, reduced: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the maps and of the parameters, in the order of `refine_lean`."""
    dtype, count, slices = group.maps.dtype, group.count, group.slices
    norm1, norm2, norm3, norm4 = group.norms

    def at_last(part: slice) -> tuple[Tensor, Tensor]:
        """Gradient of the last BatchNorm's output, and its normalised input."""
        return group.masked(_accurate(grad[part]) * group.scale, part), norm4.normal(group.summed(reduced, part))

    sums4 = _total(_sums(*at_last(part)) for part in slices)

    def at_sum(part: slice) -> Tensor:
        """Gradient of the sum of shortcut and third BatchNorm."""
        return group.masked(norm4.backward(*at_last(part), sums4, count), part)

    sums3 = _total(_sums(at_sum(part), norm3.normal(reduced[part])) for part in slices)

    def at_second(part: slice, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradient of the reduced maps; of the second BatchNorm, its normalised input, output, gradient of this."""
        grad_reduced = norm3.backward(at_sum(part), norm3.normal(reduced[part]), sums3, count)
        grad_reduced = group.masked(grad_reduced, part).to(dtype)
        normal = norm2.normal(convolved)
        output = norm2.affine(normal)
        grad_hidden = F.conv2d(grad_reduced, group.reduce.t().to(dtype)[..., None, None])
        return grad_reduced, normal, output, _accurate(grad_hidden) * _inside(output)

    sums2 = grad_reduce = torch.zeros((), dtype=count.dtype, device=count.device)
    for part in slices:
        _, convolved = group.local(group.expanded(group.centered(part)), part)
        grad_reduced, normal, output, grad_output = at_second(part, convolved)
        grad_reduce = grad_reduce + _outer(grad_reduced, F.relu6(output).to(dtype))
        sums2 = sums2 + _sums(grad_output, normal)

    grad_maps = torch.empty_like(reduced)
    grad_kernel = moments1 = sum1 = torch.zeros((), dtype=count.dtype, device=count.device)
    kernel, back = group.kernel.to(dtype), (norm1.scale[:, None] * group.expand).t().to(dtype)[..., None, None]
    for part in slices:
        centered = group.centered(part)
        expanded = group.expanded(centered)
        hidden, convolved = group.local(expanded, part)
        _, normal, _, grad_output = at_second(part, convolved)
        grad_convolved = group.masked(norm2.backward(grad_output, normal, sums2, count), part).to(dtype)
        grad_expanded, grad_part = _convolution_backward(grad_convolved, hidden, kernel)
        grad_expanded = group.masked(grad_expanded * _inside(expanded), part)
        grad_kernel = grad_kernel + _accurate(grad_part)
        sum1 = sum1 + grad_expanded.sum((0, 2, 3), dtype=count.dtype)
        moments1 = moments1 + _outer(grad_expanded, centered)
        grad_maps[part] = at_sum(part) + F.conv2d(grad_expanded, back)

    # What the first BatchNorm's statistics add: its normalised input is inv · W (A - mean), linear in the maps.
    moment1 = norm1.inv * (moments1 * group.expand).sum(1)
    pull = norm1.scale * norm1.inv * moment1 / count
    mixed = group.expand.t() @ (pull[:, None] * group.expand)
    shift = group.expand.t() @ (norm1.scale * sum1 / count)
    for part in slices:
        linear = F.conv2d(_accurate(group.centered(part)), mixed[..., None, None], shift)
        grad_maps[part] -= group.masked(linear, part).to(dtype)
    grad_expand = norm1.scale[:, None] * (moments1 - (norm1.inv * moment1)[:, None] * (group.expand @ group.covariance))
    ordered = [grad_expand, moment1, sum1, grad_kernel, sums2[1], sums2[0], grad_reduce, sums3[1], sums3[0]]
    return grad_maps, [*ordered, sums4[1], sums4[0]]


def _convolution_backward(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the kernel of a depthwise convolution with zero padding."""
    padding = [kernel.shape[-1] // 2] * 2
    settings = ([1, 1], padding, [1, 1], False, [0, 0], len(kernel), [True, True, False])
    grad_x, grad_kernel, _ = torch.ops.aten.convolution_backward(grad, x, kernel, None, *settings)
    return grad_x, grad_kernel


def _as_typed(maps: Tensor) -> AbstractContextManager[object]:
    """Without autocast, which the meta device doesn't know: types are chosen here."""
    device = maps.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _accurate(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _wide(x: Tensor) -> Tensor:
    """(C,) beside (b, C, N, N)."""
    return x[:, None, None]


def _inside(x: Tensor) -> Tensor:
    """Where a ReLU6 has a slope."""
    return (x > 0) & (x < 6)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Sum over samples and places: (b, C, N, N) and (b, C', N, N) -> (C, C')."""
    return _accurate(a.flatten(2) @ b.flatten(2).transpose(1, 2)).sum(0)


def _sums(grad: Tensor, normal: Tensor) -> Tensor:
    """Sums of a gradient, and of it times normalised values: (2, C)."""
    return torch.stack([grad.sum((0, 2, 3)), (grad * normal).sum((0, 2, 3))])


def _total(values: Iterable[Tensor]) -> Tensor:
    first, *others = values
    return sum(others, first)
