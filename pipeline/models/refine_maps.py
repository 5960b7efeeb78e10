"""Refiner's operations on attention maps.

Zhou et al., "Refiner: Refining Self-attention for Vision Transformers", 2021, arXiv 2106.03714.

A map of one head is an image of N x N pixels, and the heads are its channels. Attention expansion mixes H maps to
H' = expansion x H, distributed local attention convolves each with its own small kernel, and the reduction mixes them
back to H. Tokens lie on both axes in raster order, the class token (if any) first, as in the official code.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.attention import MapAttention
from pipeline.models.batch_norm import BatchNorm2d
from pipeline.models.errors import ModelError
from pipeline.models.kernels import runs_here
from pipeline.models.layers import Mlp
from pipeline.models.refine_fused import refine_fused
from pipeline.models.refine_lean import refine_lean
from pipeline.models.refine_local import Local, check_raster, make_local

Model = TypeVar("Model", bound=nn.Module)
# The epsilon of these BatchNorms matters: attention maps vary by less than its root.
BN_EPS = 1e-5


class LinearRefiner(nn.Module):
    """The paper's form: 1x1 expansion, local kernels, 1x1 reduction, all without bias and with nothing in between.

    A product of linear maps is one linear map: `fold` gives it.

    Attributes:
        lean: compute that one map in training as well, and keep none of the expanded ones; see `set_lean`.
    """

    def __init__(self, num_heads: int, expansion: int, kernel: int, reduction: bool, local: Local = "raster") -> None:
        super().__init__()
        hidden = num_heads * expansion
        self.out_maps = num_heads if reduction else hidden
        self.expand = nn.Conv2d(num_heads, hidden, kernel_size=1, bias=False)
        self.local: Any = make_local(hidden, kernel, local)
        self.reduce = nn.Conv2d(hidden, num_heads, kernel_size=1, bias=False) if reduction else nn.Identity()
        self.lean = False

    def forward(self, maps: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, H, N, N) -> (B, out_maps, N, N).

        Args:
            real: (B, 1, N, N), 1 where query and key are tokens and 0 where one is padding; None: no padding. Padding
                is not mixed into tokens, and the result is 0 there, as if the map ended before it.
        """
        if real is None:
            return self._refine(maps)
        return self._refine(maps * real) * real

    def _refine(self, maps: Tensor) -> Tensor:
        if self.lean and self.training:
            return F.conv2d(maps, self._kernel(), padding=self.local.padding)
        return self.reduce(self.local(self.expand(maps)))

    def _kernel(self) -> Tensor:
        """Of the one convolution that does it all, (out_maps, H, k, k)."""
        kernel = self.local.weight * self.expand.weight  # (H', 1, k, k) x (H', H, 1, 1)
        if not isinstance(self.reduce, nn.Conv2d):
            return kernel
        # Not a matrix product, which autocast would compute in half precision.
        return (self.reduce.weight[..., None] * kernel).sum(1)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Make the whole the identity, with a random expansion: trained weights around it go on as they were.

        Raises:
            ModelError: without the reduction there is no way back to as many maps.
        """
        if not isinstance(self.reduce, nn.Conv2d):
            raise ModelError("refine.reduction=false can't start as the identity: set refine_start=random")
        middle = self.local.kernel_size[0] // 2
        self.local.weight.zero_()
        self.local.weight[:, :, middle, middle] = 1
        if not self.expand.weight.is_meta:
            self.reduce.weight[:, :, 0, 0] = torch.linalg.pinv(self.expand.weight[:, :, 0, 0].double()).float()

    @torch.no_grad()
    def fold(self) -> FoldedLinear:
        """One dense k x k convolution that computes the same, borders included: zero padding meets no bias.

        Raises:
            ModelError: the kernels lie on the plane of queries.
        """
        check_raster(self.local, "fold()")
        folded = FoldedLinear(self.expand.in_channels, self.out_maps, self.local.kernel_size[0])
        folded.conv.weight = nn.Parameter(self._kernel())
        return folded.train(self.training)


class FoldedLinear(nn.Module):
    """What `LinearRefiner.fold` gives: a dense convolution from H to `out_maps` maps."""

    def __init__(self, num_heads: int, out_maps: int, kernel: int) -> None:
        super().__init__()
        self.out_maps = out_maps
        self.conv = nn.Conv2d(num_heads, out_maps, kernel, padding=kernel // 2, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, N, N) -> (B, out_maps, N, N)."""
        return self.conv(maps)


class OfficialRefiner(nn.Module):
    """The released form: 1x1, BN, ReLU6, local kernels, BN, ReLU6, 1x1, BN, plus the input, BN, times `scale`.

    Official files: `models/refiner_utils.py`, class DLA, and `adapt_bn` of `models/refined_transformer.py`. The
    released models ignore their own expansion and kernel options; here they act.

    Attributes:
        lean: in training, keep two maps per head for the backward pass in place of twenty; see `set_lean`.
        fused: the same by kernels of this package, in training on a GPU; with padding it is `lean` that counts there,
            elsewhere nothing changes.
    """

    def __init__(self, num_heads: int, expansion: int, kernel: int, scale: float, local: Local = "raster") -> None:
        super().__init__()
        hidden = num_heads * expansion
        self.out_maps = num_heads
        self.scale = scale
        self.expand = nn.Conv2d(num_heads, hidden, kernel_size=1, bias=False)
        self.bn1 = BatchNorm2d(hidden, eps=BN_EPS)
        self.local: Any = make_local(hidden, kernel, local)
        self.bn2 = BatchNorm2d(hidden, eps=BN_EPS)
        self.reduce = nn.Conv2d(hidden, num_heads, kernel_size=1, bias=False)
        self.bn3 = BatchNorm2d(num_heads, eps=BN_EPS)
        self.adapt_bn = BatchNorm2d(num_heads, eps=BN_EPS)
        self.lean = False
        self.fused = False

    def norms(self) -> list[BatchNorm2d]:
        """The BatchNorms in the order of computation."""
        return [self.bn1, self.bn2, self.bn3, self.adapt_bn]

    def forward(self, maps: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, H, N, N) -> (B, H, N, N).

        Args:
            real: where tokens meet tokens, as in `LinearRefiner`; statistics are taken over these places alone.
        """
        if self.training and torch.is_grad_enabled():
            if self.fused and real is None and runs_here(maps):
                return refine_fused(self, maps)
            if self.lean:
                return refine_lean(self, maps, real)
        if real is None:
            x = F.relu6(self.bn1(self.expand(maps)))
            x = F.relu6(self.bn2(self.local(x)))
            return self.adapt_bn(self.bn3(self.reduce(x)) + maps) * self.scale
        # A BatchNorm's bias would fill the padding, which the local kernels would then carry into tokens.
        x = F.relu6(self.bn1(self.expand(maps * real), real)) * real
        x = F.relu6(self.bn2(self.local(x), real))
        return self.adapt_bn(self.bn3(self.reduce(x), real) + maps, real) * (self.scale * real)

    @torch.no_grad()
    def fold(self) -> FoldedOfficial:
        """The same function as in evaluation, without BatchNorms.

        Raises:
            ModelError: the kernels lie on the plane of queries.
        """
        check_raster(self.local, "fold()")
        folded = FoldedOfficial(self.expand.in_channels, self.expand.out_channels, self.local.kernel_size[0])
        u1, v1 = _affine(self.bn1)
        u2, v2 = _affine(self.bn2)
        u3, v3 = _affine(self.bn3)
        ua, va = _affine(self.adapt_bn)
        c = self.scale * ua
        for conv, weight, bias in (
            (folded.expand, _scaled(u1, self.expand), v1),
            (folded.local, _scaled(u2, self.local), v2),
            (folded.reduce, _scaled(c * u3, self.reduce), c * v3 + self.scale * va),
        ):
            conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        folded.shortcut = nn.Parameter(c[:, None, None])
        return folded.train(self.training)


class FoldedOfficial(nn.Module):
    """What `OfficialRefiner.fold` gives: three convolutions with bias, two ReLU6, a shortcut scaled per head."""

    def __init__(self, num_heads: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.out_maps = num_heads
        self.expand = nn.Conv2d(num_heads, hidden, kernel_size=1)
        self.local = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
        self.reduce = nn.Conv2d(hidden, num_heads, kernel_size=1)
        self.shortcut = nn.Parameter(torch.ones(num_heads, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, N, N) -> (B, H, N, N)."""
        x = F.relu6(self.local(F.relu6(self.expand(maps))))
        return self.reduce(x) + self.shortcut * maps


def _affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation as x -> u x + v."""
    assert bn.running_mean is not None and bn.running_var is not None
    u = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return u, bn.bias - u * bn.running_mean


def _scaled(factor: Tensor, conv: nn.Conv2d) -> Tensor:
    return factor[:, None, None, None] * conv.weight


def set_lean(model: nn.Module, lean: bool = True) -> int:
    """Train a model that refines its maps with little memory: it computes the same.

    No expanded map is kept for the backward pass: an official refiner computes them again there (`refine_lean`), a
    linear one never makes them. And see `set_few_copies`.

    Returns:
        How many refiners the model has.

    Raises:
        ModelError: their kernels lie on the plane of queries.
    """
    refiners = [m for m in model.modules() if isinstance(m, LinearRefiner | OfficialRefiner)]
    for refiner in refiners:
        check_raster(refiner.local, "train.activation_checkpointing=maps")
        refiner.lean = lean
    set_few_copies(model, lean and bool(refiners))
    return len(refiners)


def set_few_copies(model: nn.Module, wanted: bool = True) -> None:
    """Keep attention maps in one type, and nothing behind a GELU, for the backward pass."""
    for module in model.modules():
        if isinstance(module, MapAttention | Mlp):
            module.lean = wanted


def fold_refiners(model: Model) -> Model:
    """A copy of the model for inference, each refiner folded into fewer operations with the same results.

    A linear refiner becomes one dense convolution; an official one loses its BatchNorms. The copy has another state
    dict and is in evaluation mode.
    """
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        refiner = getattr(module, "refiner", None)
        if isinstance(refiner, LinearRefiner | OfficialRefiner):
            module.refiner = refiner.fold()
    return folded
