"""Mixup, CutMix and the loss: against timm and NesT's formulas, and the same for any number of processes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import mixup as timm_mixup
from timm.loss import SoftTargetCrossEntropy

from pipeline.data.augment.keyed import Stream, chunk_key, generator, uniforms
from pipeline.data.augment.mixing import (
    MixConfig,
    MixParams,
    apply_mix,
    draw_mix,
    smooth_one_hot,
    soft_target_cross_entropy,
)
from pipeline.errors import UserError

K = 10
TIMM = MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1)
NEST = TIMM.model_copy(update={"mode": "sample", "beta": "nest_approx"})


def batch(size: int, side: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, side, side, generator=random), torch.randint(K, (size,), generator=random)


def only(config: MixConfig, kind: str) -> MixConfig:
    return config.model_copy(update={"cutmix_alpha" if kind == "mixup" else "mixup_alpha": 0.0})


# the same for any number of processes


@pytest.mark.parametrize("config", [TIMM, NEST, only(NEST, "mixup"), only(TIMM, "cutmix")])
def test_result_does_not_depend_on_the_world_size(config: MixConfig) -> None:
    lanes, chunk = 8, 6
    images, labels = batch(lanes * chunk)
    by_lane = images.view(lanes, chunk, *images.shape[1:]), labels.view(lanes, chunk)

    def run(world_size: int, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        mixed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for rank in range(world_size):
            mine = list(range(rank, lanes, world_size))
            params = draw_mix(config, 3, step, mine, chunk, 16)
            x, y = apply_mix(by_lane[0][mine].flatten(0, 1), by_lane[1][mine].flatten(), params, K)
            mixed |= {lane: pair for lane, *pair in zip(mine, x.split(chunk), y.split(chunk), strict=True)}  # type: ignore[misc]
        return [mixed[lane] for lane in range(lanes)]

    for step in range(4):
        alone = run(1, step)
        for world_size in (2, 4, 8):
            for (x, y), (x0, y0) in zip(run(world_size, step), alone, strict=True):
                assert torch.equal(x, x0) and torch.equal(y, y0)


def test_pure_and_different_for_every_step_lane_and_seed() -> None:
    first = draw_mix(NEST, 0, 5, [2], 8, 16)
    again = draw_mix(NEST, 0, 5, [2], 8, 16)
    assert all(torch.equal(a, b) for a, b in zip(first[:-1], again[:-1], strict=True))
    others = [draw_mix(NEST, *key, 8, 16) for key in ((0, 6, [2]), (0, 5, [3]), (1, 5, [2]))]
    assert all(not torch.equal(first.label, other.label) for other in others)


# timm's conventions


def papers_box(side: int, lam: float, y: int, x: int) -> tuple[int, int, int, int]:
    """`rand_bbox` of timm 0.3.2 and 0.4.9: half of the side, rounded down, before the centre and after it."""
    half = int(side * np.sqrt(1 - lam)) // 2
    return max(y - half, 0), min(y + half, side), max(x - half, 0), min(x + half, side)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_batch_mode_is_timms(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's Mixup, given the weight and the centre that we drew, makes the same batch and targets.

    Its boxes have grown since the papers: with an odd side the one of timm 1.0.31 is a pixel larger.
    """
    config, side = only(TIMM, kind), 24
    for step in range(30):
        images, labels = batch(8, side, step)
        key = chunk_key(0, step, 1)
        alpha = config.mixup_alpha or config.cutmix_alpha
        weight = generator(key, Stream.MIX_WEIGHT).beta(alpha, alpha)
        box = papers_box(side, weight, *(uniforms(key, Stream.MIX_BOX, 2) * side).astype(int))
        monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *args, box=box, **kwargs: box)
        theirs = timm_mixup.Mixup(config.mixup_alpha, config.cutmix_alpha, num_classes=K, label_smoothing=0.1)
        monkeypatch.setattr(theirs, "_params_per_batch", lambda weight=weight: (weight, kind == "cutmix"))
        x0, y0 = theirs(images.clone(), labels)
        x, y = apply_mix(images, labels, draw_mix(config, 0, step, [1], 8, side), K)
        torch.testing.assert_close(x, x0, atol=1e-6, rtol=0)
        torch.testing.assert_close(y, y0, atol=1e-6, rtol=0)
        if kind == "cutmix":
            assert torch.equal(x, x0)  # pixels are moved, not computed


@pytest.mark.parametrize("side", [8, 16, 32, 224])
def test_timm_cutmix_label_is_the_share_of_own_pixels(side: int) -> None:
    params = [draw_mix(only(TIMM, "cutmix"), 1, step, [0], 4, side) for step in range(200)]
    for p in params:
        area = (p.box[:, 1] - p.box[:, 0]) * (p.box[:, 3] - p.box[:, 2])
        torch.testing.assert_close(p.label, 1 - area.float() / side**2)
        assert p.box.min() >= 0 and p.box.max() <= side
        assert torch.equal(p.partner, torch.tensor([3, 2, 1, 0]))
        uncut = p.box[0, 0] > 0 and p.box[0, 1] < side
        assert not uncut or (p.box[0, 1] - p.box[0, 0]) % 2 == 0
    # CutMix keeps Beta(1, 1) but for the border, where boxes are cut, and the pixel that odd sides lose.
    rng = np.random.default_rng(0)
    half = (side * np.sqrt(rng.random(100_000))).astype(int) // 2
    y, x = rng.integers(0, side, (2, 100_000))
    lengths = [np.minimum(c + half, side) - np.maximum(c - half, 0) for c in (y, x)]
    expected = 1 - np.mean(lengths[0] * lengths[1]) / side**2
    assert 0.5 < expected < 0.8 and np.mean([p.label[0] for p in params]) == pytest.approx(expected, abs=0.06)


# NesT's conventions


def test_nest_mixup_is_the_official_formula() -> None:
    """batch_mixup: mix = u^(1/alpha) / 2, folded to max(mix, 1 - mix); a shuffled partner."""
    config, seen = only(NEST, "mixup"), set()
    for step in range(40):
        images, labels = batch(8, 12, step)
        params = draw_mix(config, 0, step, [5], 8, 12)
        u = uniforms(chunk_key(0, step, 5), Stream.MIX_WEIGHT, 8)
        half = u ** (1 / 0.8) / 2
        mix = torch.from_numpy(np.maximum(half, 1 - half)).float()
        partner = params.partner
        assert sorted(partner.tolist()) == list(range(8))
        seen.add(tuple(partner.tolist()))
        smooth = torch.full((8, K), 0.1 / K).scatter_(1, labels[:, None], 0.9 + 0.1 / K)
        w = mix.view(-1, 1, 1, 1)
        x, y = apply_mix(images, labels, params, K)
        torch.testing.assert_close(x, images * w + images[partner] * (1 - w), atol=1e-6, rtol=0)
        torch.testing.assert_close(y, smooth * mix[:, None] + smooth[partner] * (1 - mix[:, None]), atol=1e-6, rtol=0)
    assert len(seen) > 35  # shuffled anew


@pytest.mark.parametrize("side", [16, 32, 224])
def test_nest_cutmix_is_the_official_formula(side: int) -> None:
    """batch_cutmix: own pixels in a box of floor(sqrt(b) side), rolled to its place; label weight b, not corrected."""
    config, chunk = only(NEST, "cutmix"), 6
    for step in range(25):
        images, labels = batch(chunk, side, step)
        key = chunk_key(2, step, 0)
        b = uniforms(key, Stream.MIX_WEIGHT, chunk) / 2
        masks = []
        for i, (length, shift) in enumerate(
            zip(
                (np.sqrt(b) * side).astype(int),
                (uniforms(key, Stream.MIX_BOX, 2 * chunk).reshape(2, chunk) * side).astype(int).T,
                strict=True,
            )
        ):
            line = np.arange(side) < length
            y, x = (np.roll(line, s % (side - length)) for s in shift)
            masks.append(np.outer(y, x))
            assert masks[-1].sum() == length**2, i  # never over the border
        mask = torch.from_numpy(np.stack(masks))[:, None]
        mixed, targets = apply_mix(images, labels, draw_mix(config, 2, step, [0], chunk, side), K)
        assert torch.equal(mixed, torch.where(mask, images, images.flip(0)))
        smooth = smooth_one_hot(labels, K, 0.1)
        weight = torch.from_numpy(b).float()[:, None]
        torch.testing.assert_close(targets, smooth * weight + smooth.flip(0) * (1 - weight), atol=1e-6, rtol=0)
        share = mask.float().mean(dim=(1, 2, 3))
        assert (share <= weight[:, 0] + 1e-6).all() and (share >= (weight[:, 0].sqrt() - 1 / side) ** 2 - 1e-6).all()


@pytest.mark.parametrize(
    ("beta", "mean"),
    # E max(b, 1 - b): 1 - 1 / (2 (1 + 1/0.8)) for NesT's approximation, numerically integrated for Beta(0.8, 0.8).
    [("nest_approx", 0.7778), ("exact", 0.7719)],
)
def test_mean_mixup_weight(beta: Any, mean: float) -> None:
    config = only(NEST, "mixup").model_copy(update={"beta": beta})
    weights = torch.cat([draw_mix(config, 0, step, range(8), 64, 16).label for step in range(30)])
    assert weights.min() >= 0.5 and weights.max() <= 1
    assert abs(weights.mean() - mean) < 4 * 0.146 / math.sqrt(len(weights))


@pytest.mark.parametrize("beta", ["nest_approx", "exact"])
def test_mean_cutmix_weight(beta: Any) -> None:
    """With alpha 1 both are uniform on [0, 1/2]."""
    config = only(NEST, "cutmix").model_copy(update={"beta": beta})
    weights = torch.cat([draw_mix(config, 0, step, range(8), 64, 16).label for step in range(20)])
    counts, _ = np.histogram(weights, bins=20, range=(0, 0.5))
    assert counts.sum() == len(weights)
    assert ((counts - len(weights) / 20) ** 2 / (len(weights) / 20)).sum() < 50  # 19 degrees of freedom: 99.99 %


# when and what


@pytest.mark.parametrize("config", [TIMM, NEST])
def test_probabilities(config: MixConfig) -> None:
    config = config.model_copy(update={"prob": 0.6, "switch_prob": 0.3})
    params = draw_mix(config, 0, 0, range(4000), 2, 16)
    mixed = (params.inside != 1) | (params.outside != 1)
    cut = params.inside != params.outside
    per_chunk = mixed.view(-1, 2).any(1), cut.view(-1, 2).any(1)
    assert abs(per_chunk[0].float().mean() - 0.6) < 4 * math.sqrt(0.24 / 4000)
    assert abs(per_chunk[1].float().mean() - 0.18) < 4 * math.sqrt(0.18 * 0.82 / 4000)


def test_no_mixing_leaves_images_and_smooths_labels() -> None:
    images, labels = batch(6)
    for config in (MixConfig(label_smoothing=0.1), TIMM.model_copy(update={"prob": 0.0})):
        x, y = apply_mix(images, labels, draw_mix(config, 0, 0, [0, 1], 3, 16), K)
        assert torch.equal(x, images)
        assert torch.equal(y, smooth_one_hot(labels, K, 0.1))
    values = smooth_one_hot(torch.tensor([3]), 4, 0.1)[0].tolist()
    assert values == pytest.approx([0.025, 0.025, 0.025, 0.925])


def test_one_sample_has_no_partner() -> None:
    with pytest.raises(UserError, match=r"set a smaller data\.lanes"):
        draw_mix(TIMM, 0, 0, [0], 1, 16)
    assert torch.equal(draw_mix(MixConfig(), 0, 0, [0, 4], 1, 16).label, torch.ones(2))


def test_middle_of_an_odd_chunk_stays_itself() -> None:
    images, labels = batch(5)
    x, y = apply_mix(images, labels, draw_mix(TIMM, 0, 3, [0], 5, 16), K)
    torch.testing.assert_close(x[2], images[2], atol=1e-6, rtol=0)
    torch.testing.assert_close(y[2], smooth_one_hot(labels, K, 0.1)[2])


# how


@pytest.mark.parametrize("config", [TIMM, NEST])
def test_targets_sum_to_one_and_inputs_stay(config: MixConfig) -> None:
    images, labels = batch(12)
    kept = images.clone(), labels.clone()
    for step in range(20):
        x, y = apply_mix(images, labels, draw_mix(config, 0, step, range(3), 4, 16), K)
        assert x.shape == images.shape and y.shape == (12, K) and y.dtype == torch.float32
        torch.testing.assert_close(y.sum(1), torch.ones(12))
        assert y.min() >= 0.1 / K - 1e-7
    assert torch.equal(images, kept[0]) and torch.equal(labels, kept[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_layout_and_autocast(dtype: torch.dtype) -> None:
    images, labels = batch(8)
    params = draw_mix(NEST, 0, 1, [0], 8, 16)
    exact, targets = apply_mix(images.to(dtype).double(), labels, params, K)
    with torch.autocast("cpu", torch.bfloat16):
        x, y = apply_mix(images.to(dtype).to(memory_format=torch.channels_last), labels, params, K)
    assert x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)
    assert torch.equal(y, targets)


def test_never_looks_at_values_on_the_host() -> None:
    """Meta tensors have no values: anything that would wait for the device fails on them."""
    images, labels = batch(8)
    params = draw_mix(TIMM, 0, 0, [0], 8, 16).to(torch.device("meta"))
    x, y = apply_mix(images.to("meta"), labels.to("meta"), params, K)
    loss = soft_target_cross_entropy(torch.randn(8, K, device="meta"), y)
    assert x.shape == images.shape and loss.shape == ()
    assert all(field.device.type == "meta" for field in params[:-1]) and params.label_smoothing == 0.1


def test_compiles_to_one_graph_without_recompiling() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def step(images: torch.Tensor, labels: torch.Tensor, params: MixParams, logits: torch.Tensor) -> torch.Tensor:
        mixed, targets = apply_mix(images, labels, params, K)
        return soft_target_cross_entropy(logits, targets) + mixed.mean()

    compiled = torch.compile(step, fullgraph=True, backend=count)
    logits = torch.randn(8, K, generator=torch.Generator().manual_seed(0))
    for n in range(5):
        images, labels = batch(8, seed=n)
        params = draw_mix(TIMM, 0, n, [0], 8, 16)
        torch.testing.assert_close(compiled(images, labels, params, logits), step(images, labels, params, logits))
    assert graphs == 1


def test_loss() -> None:
    logits = torch.randn(16, K, generator=torch.Generator().manual_seed(0)) * 4
    labels = torch.arange(16) % K
    smoothed = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(soft_target_cross_entropy(logits, smooth_one_hot(labels, K, 0.1)), smoothed)
    targets = torch.softmax(torch.randn(16, K, generator=torch.Generator().manual_seed(1)), dim=1)
    torch.testing.assert_close(soft_target_cross_entropy(logits, targets), SoftTargetCrossEntropy()(logits, targets))
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = soft_target_cross_entropy(logits.bfloat16(), targets)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits.bfloat16().float(), targets))
