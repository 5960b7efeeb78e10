"""One group of BatchNorm statistics of a refiner, and what is known of it: the arithmetic of `refine_lean`.

Every operation goes through memory once: products and sums of tensors of half precision with float32 factors are one
operation that rounds once (`linear`), not several on float32 copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.errors import ModelError

if TYPE_CHECKING:
    from pipeline.models.refine_maps import OfficialRefiner

# What refines a few groups, and has the BatchNorms take note: their place in the batch, their maps, how many they are,
# the parameters as `Group` takes them -> refined maps.
Refined = Callable[[slice, Tensor, int, Sequence[Tensor]], Tensor]
# Elements of the expanded maps of one slice: 128 MB in half precision, of which up to eight exist at a time.
SLICE = 2**26


def refine_groups(refiner: OfficialRefiner, maps: Tensor, refined: Refined, most: int = 1) -> Tensor:
    """Refine the maps, a few groups of BatchNorm statistics at a time: (B, H, N, N) -> same shape.

    Args:
        most: samples at a time, and one group where this is more.

    Raises:
        ModelError: the batch can't be cut into the groups of the BatchNorms.
    """
    group = refiner.bn1.group or len(maps)
    if len(maps) % group:
        raise ModelError(f"{len(maps)} samples can't be cut into groups of {group} for BatchNorm")
    device = maps.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        maps = maps.to(torch.get_autocast_dtype(device))
    convs, norms = (refiner.expand, refiner.local, refiner.reduce), refiner.norms()
    parameters = [p for conv, norm in zip(convs, norms, strict=False) for p in (conv.weight, norm.weight, norm.bias)]
    parameters += [norms[3].weight, norms[3].bias]
    # Of equal size, as far as may be.
    groups = len(maps) // group
    step = -(-groups // -(-groups // max(1, most // group))) * group
    parts = [slice(first, min(first + step, len(maps))) for first in range(0, len(maps), step)]
    out = [refined(part, maps[part], (part.stop - part.start) // group, parameters) for part in parts]
    return out[0] if len(out) == 1 else torch.cat(out)


class Norm(NamedTuple):
    """A BatchNorm with known statistics, all (C,): x -> weight · (x - mean) · inv + bias."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    inv: Tensor

    @property
    def scale(self) -> Tensor:
        """k of x -> k x + shift, (C,)."""
        return self.weight * self.inv

    def __call__(self, x: Tensor, times: float = 1.0) -> Tensor:
        """(b, C, N, N) -> the same shape and type."""
        return linear(times * (self.bias - self.scale * self.mean), (x, times * self.scale))

    def sums(self, grad: Tensor, x: Tensor) -> Tensor:
        """Sums over samples and places of the output's gradient, and of it times the normalised input: (2, C)."""
        total = sum_places(grad)
        return torch.stack([total, self.inv * (sum_places(grad * x) - self.mean * total)])

    def backward(self, grad: Tensor, x: Tensor, sums: Tensor, count: Tensor) -> Tensor:
        """Gradient of x, from that of the output and its sums over all samples; the type of x."""
        means = sums / count
        pull = self.inv * means[1]
        return linear(self.scale * (self.mean * pull - means[0]), (x, -self.scale * pull), (grad, self.scale))


class Group:
    """The maps of one group, and what is known of them: statistics are learnt one after the other.

    Args:
        elements: of the expanded maps of a slice at most; None: `SLICE`.

    Attributes:
        slices: of samples.
        count: places of the statistics, 0-D.
        center, covariance: (H,) and (H, H), of the maps.
        statistics: mean and variance of each BatchNorm, as far as known.
        norms: the BatchNorms with these.
    """

    def __init__(
        self,
        maps: Tensor,
        real: Tensor | None,
        eps: float,
        scale: float,
        parameters: Sequence[Tensor],
        elements: int | None = None,
    ) -> None:
        self.maps, self.real, self.eps, self.scale = maps, real, eps, scale
        expand, weight1, bias1, kernel, weight2, bias2, reduce, weight3, bias3, weight4, bias4 = map(
            accurate, parameters
        )
        self.expand, self.kernel, self.reduce = expand.flatten(1), kernel, reduce.flatten(1)
        self._affine = ((weight1, bias1), (weight2, bias2), (weight3, bias3), (weight4, bias4))
        step = max(1, (elements or SLICE) // (len(expand) * maps[0, 0].numel()))
        self.slices = [slice(i, min(i + step, len(maps))) for i in range(0, len(maps), step)]
        everywhere = expand.new_full((), maps[:, 0].numel())
        self.count = everywhere if real is None else real.sum(dtype=expand.dtype)
        self.center = self.covariance = everywhere  # until they are known
        self.statistics: list[Tensor] = []
        self.norms: list[Norm] = []

    def learn(self, mean: Tensor, var: Tensor) -> None:
        """Take note of the statistics of the next BatchNorm."""
        self.norms.append(Norm(*self._affine[len(self.norms)], mean, torch.rsqrt(var + self.eps)))
        self.statistics += [mean, var]

    def masked(self, x: Tensor, part: slice) -> Tensor:
        """0 where padding is."""
        return x if self.real is None else x * self.real[part]

    def moments(self, values: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, (C,) each, of values (b, C, N, N) that come slice by slice."""
        means, variances, shares = [], [], []
        for part, x in zip(self.slices, values, strict=True):
            if self.real is None:
                n: int | Tensor = x[:, 0].numel()
            else:
                x, n = self.masked(x, part), self.real[part].sum(dtype=self.count.dtype)
            mean = sum_places(x) / n
            if x.dtype == self.count.dtype:
                var = sum_places(self.masked((x - wide(mean)).square(), part)) / n
            else:  # rounded to half precision: what this cancels is less than what the rounding did
                squares = torch.linalg.vector_norm(x, dim=(0, 2, 3), dtype=self.count.dtype).square()
                var = (squares / n - mean.square()).clamp(min=0)
            means.append(mean)
            variances.append(var)
            shares.append(n / self.count)
        of_all = total(share * mean for share, mean in zip(shares, means, strict=True))
        spread = (v + (mean - of_all).square() for v, mean in zip(variances, means, strict=True))
        return of_all, total(share * v for share, v in zip(shares, spread, strict=True))

    def centered(self, part: slice) -> Tensor:
        """The maps less their means, (b, H, N, N): half precision has few digits for differences of large numbers."""
        maps = self.maps[part]
        return self.masked(torch.sub(maps, wide(self.center), out=torch.empty_like(maps)), part)

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
        return self.norms[2](reduced[part]).add_(self.maps[part])


def linear(shift: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """shift + sum of k x over the terms (x, k), with (C,) and (b, C, N, N); the type of x, k and shift in their own."""
    out, first = wide(shift), terms[0][0]
    result = torch.empty_like(first)
    for x, k in terms:
        out = torch.addcmul(out, x, wide(k), out=result)
    return out


def as_typed(maps: Tensor) -> AbstractContextManager[object]:
    """Without autocast: types are chosen here."""
    device = maps.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


def _has_autocast(device: str) -> bool:
    """Of those that models are on all but this; torch.compile of PyTorch 2.11 can't ask PyTorch itself."""
    return device != "meta"


def sum_places(x: Tensor) -> Tensor:
    """Over samples and places, in float32 at least: (b, C, N, N) -> (C,)."""
    return x.sum((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def total(values: Iterable[Tensor]) -> Tensor:
    first, *others = values
    return sum(others, first)


def accurate(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wide(x: Tensor) -> Tensor:
    """(C,) beside (b, C, N, N)."""
    return x[:, None, None]
