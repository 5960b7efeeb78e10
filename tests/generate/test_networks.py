"""The networks: shapes over levels and de-aggregations, pixel shuffle as the inverse of blocks, who gets gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.generate.bench import generator_macs
from pipeline.models import ModelError
from pipeline.models.blocks import blockify, unblockify
from pipeline.models.facts import count_params
from pipeline.models.generate import Discriminator, Gan, create_generator, list_generators, make_gan, total
from pipeline.models.generate.deaggregate import Deaggregate, pixel_shuffle, pixel_unshuffle

KINDS = ("pixel_shuffle", "nearest", "bilinear", "conv_transpose")
TINY: dict[str, Any] = {"img_size": 16, "latent_dim": 6, "embed_dims": 8, "depths": 1, "num_heads": 2, "patch_size": 1}
SMALL: dict[str, dict[str, Any]] = {
    "nest_gen_micro": TINY | {"num_levels": 3},
    "plane_gen_micro": TINY | {"num_levels": 3},
    "conv_gen_micro": {"img_size": 16, "latent_dim": 6, "width": 4},
}


@pytest.mark.parametrize("attend", ["block", "plane"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("levels", "patch", "widths", "depths"), [(1, 1, 8, 1), (2, 2, (16, 8), (0, 1)), (3, 1, (16, 4, 8), (1, 2, 1))]
)
def test_generator_over_levels(levels: int, patch: int, widths: Any, depths: Any, kind: str, attend: str) -> None:
    options = TINY | {"num_levels": levels, "patch_size": patch, "embed_dims": widths, "depths": depths}
    generator = create_generator("nest_gen_micro", **options, channels=1, deaggregation=kind, attend=attend)
    images = generator(torch.randn(2, 6))
    assert images.shape == (2, 1, 16, 16)
    side = 16 // patch // 2 ** (levels - 1)
    tokens = [level.pos_embed.shape[1:3] for level in generator.levels]  # type: ignore[union-attr]
    blocks = [(4**i, side**2) if attend == "block" else (1, 4**i * side**2) for i in range(levels)]
    assert [tuple(shape) for shape in tokens] == blocks
    images.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())


@pytest.mark.parametrize(("side", "plane", "channels"), [(2, 3, 5), (2, 8, 1), (4, 2, 3)])
def test_pixel_shuffle_undoes_blocks(side: int, plane: int, channels: int) -> None:
    x = torch.randn(2, plane, plane, side * side * channels)
    shuffled = pixel_shuffle(x, side)
    assert shuffled.shape == (2, side * plane, side * plane, channels)
    assert torch.equal(pixel_unshuffle(shuffled, side), x)
    # Its blocks in raster order are the tokens it came from, and torch's own pixel shuffle agrees.
    assert torch.equal(blockify(shuffled, side).flatten(2), x.flatten(1, 2))
    assert torch.equal(unblockify(blockify(shuffled, side)), shuffled)
    torchs = x.unflatten(-1, (side * side, channels)).transpose(-1, -2).flatten(-2).permute(0, 3, 1, 2)
    assert torch.equal(torch.nn.functional.pixel_shuffle(torchs, side).permute(0, 2, 3, 1), shuffled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", [2, 8, 12])
def test_deaggregation_doubles_the_plane(kind: Any, out: int) -> None:
    grow = Deaggregate(kind, 8, out)
    x = torch.randn(2, 3, 3, 8)
    assert grow(x).shape == (2, 6, 6, out)
    if kind == "pixel_shuffle" and out == 2:
        assert torch.equal(grow(x), pixel_shuffle(x, 2)), "the map is left out where the width fits"


def test_blocks_meet_in_the_latent_only() -> None:
    """Of a block generator with pixel shuffle, what one token of a level makes is the square below it."""
    generator = create_generator("nest_gen_micro", **TINY, num_levels=3)
    planes: list[Tensor] = []
    level = generator.levels[1]  # type: ignore[index]
    level.register_forward_hook(lambda module, inputs, output: planes.append(output.requires_grad_()))
    image = generator(torch.randn(1, 6))
    (slope,) = torch.autograd.grad(image[0, :, :8, :8].sum(), planes[0])
    assert slope[0, :4, :4].abs().sum() > 0
    slope[0, :4, :4] = 0
    assert not slope.any()


@pytest.mark.parametrize("of", ["64", "micro"])
def test_baselines_are_of_equal_size(of: str) -> None:
    with torch.device("meta"):
        nest, plane, conv = (create_generator(f"{kind}_gen_{of}") for kind in ("nest", "plane", "conv"))
    assert count_params(plane) == count_params(nest)
    assert abs(count_params(conv) / count_params(nest) - 1) < 0.04
    ours, theirs = generator_macs(nest), generator_macs(plane)
    linear = ours["macs"] - ours["attention_macs"]
    assert linear == theirs["macs"] - theirs["attention_macs"], "only the products of attention differ"
    # By hand: N tokens of width d, each against n others of its block or N of its plane, twice.
    levels = [(8, 384, 2), (16, 192, 2), (32, 96, 2), (64, 48, 4)]
    levels = levels if of == "64" else [(4, 96, 1), (8, 64, 1), (16, 32, 1)]
    assert ours["attention_macs"] == sum(2 * s**2 * levels[0][0] ** 2 * d * depth for s, d, depth in levels)
    assert theirs["attention_macs"] == sum(2 * s**4 * d * depth for s, d, depth in levels)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("r1_weight", [0.0, 10.0])
def test_each_loss_moves_its_own_network(name: str, r1_weight: float) -> None:
    torch.manual_seed(0)
    gan = make_gan(name, SMALL[name], {"width": 4, "max_width": 8})
    real, latents = torch.randn(4, 3, 16, 16), torch.randn(4, 6)
    for loss, moved in (("generator", gan.generator), ("discriminator", gan.discriminator)):
        gan.zero_grad()
        gan(real, latents, r1_weight)[loss].backward()
        for net in (gan.generator, gan.discriminator):
            grads = [p.grad for p in net.parameters()]
            if net is moved:
                assert all(g is not None and torch.isfinite(g).all() for g in grads)
                assert sum(bool(g.any()) for g in grads if g is not None) >= len(grads) - 1
            else:
                assert all(g is None for g in grads)


def test_losses_are_those_of_the_formulas() -> None:
    """Against logits and slopes taken by themselves, in float64; and the gradient of R1 against finite differences."""
    torch.manual_seed(0)
    gan = make_gan("nest_gen_micro", SMALL["nest_gen_micro"], {"width": 4, "max_width": 8}).double()
    judge = gan.discriminator
    real, latents = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)

    def slope_of(images: Tensor) -> Tensor:
        return torch.func.jacrev(lambda x: judge(x).sum())(images)

    class Exact(Gan):
        def _judge_real(self, real: Tensor, penalise: bool) -> tuple[Tensor, Tensor]:
            return judge(real), slope_of(real).square().sum((1, 2, 3)).mean()

    losses = gan(real, latents, 7.0)
    expected = Exact(gan.generator, judge)(real, latents, 7.0)
    for key, value in expected.items():
        torch.testing.assert_close(losses[key].double(), value.double(), rtol=1e-5, atol=1e-7)
    fake = gan.generator(latents)
    plain = torch.log1p(torch.exp(-judge(real))).mean() + torch.log1p(torch.exp(judge(fake))).mean()
    torch.testing.assert_close(losses["discriminator"].double(), plain + 7 * expected["r1"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(total(losses), losses["discriminator"] + losses["generator"])
    weight = judge.blocks[0].conv1.weight
    (by_hand,) = torch.autograd.grad(expected["discriminator"], weight)
    (own,) = torch.autograd.grad(losses["discriminator"], weight)
    torch.testing.assert_close(own, by_hand, rtol=1e-4, atol=1e-7)


def test_recomputed_layers_change_nothing() -> None:
    generator = create_generator("nest_gen_micro", **TINY, num_levels=2)
    latents = torch.randn(2, 6)
    grads = []
    for recompute in (False, True):
        generator.set_grad_checkpointing(recompute)
        generator.zero_grad()
        generator(latents).square().sum().backward()
        grads.append([p.grad.clone() for p in generator.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("nest_gen", {}, "did you mean"),
        ("nest_gen_64", {"depth": 2}, "did you mean 'depths'"),
        ("nest_gen_64", {"deaggregation": "cubic"}, "deaggregation='cubic'"),
        ("nest_gen_64", {"embed_dims": [6, 8, 8, 8], "num_heads": 1}, "multiple of 4"),
        ("nest_gen_64", {"embed_dims": [8, 8, 8, 8], "num_heads": 3}, "num_heads"),
        ("nest_gen_64", {"img_size": 60}, "img_size=60"),
        ("nest_gen_64", {"attend": "all"}, "attend='all'"),
        ("nest_gen_64", {"latent_dim": 0}, "latent_dim=0"),
        ("conv_gen_64", {"img_size": 48}, "img_size=48"),
        ("conv_gen_64", {"width": 0}, "width=0"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], word: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError) as caught:
        create_generator(name, **options)
    assert word in str(caught.value)


@pytest.mark.parametrize(("options", "word"), [({"img_size": 6}, "img_size=6"), ({"width": -1}, "width=-1")])
def test_bad_discriminators_are_named(options: dict[str, Any], word: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError) as caught:
        Discriminator(**options)
    assert word in str(caught.value)


def test_deviation_of_groups_is_numpys() -> None:
    judge = Discriminator(8, 1, width=4, max_width=8, group=3)
    seen: list[Tensor] = []
    judge.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randn(6, 1, 8, 8)
    judge(images)
    features, deviation = seen[0][:, :-1].detach().numpy(), seen[0][:, -1]
    expected = [features[i : i + 3].std(0).mean() for i in (0, 3)]
    for i in range(6):
        np.testing.assert_allclose(deviation[i].detach().numpy(), expected[i // 3], rtol=1e-4)
    with pytest.raises(ModelError, match="groups of 3"):
        judge(images[:4])


@pytest.mark.parametrize("side", [8, 24, 28, 64])
def test_discriminator_takes_even_sides(side: int) -> None:
    judge = Discriminator(side, 1, width=4, max_width=8)
    assert judge(torch.randn(3, 1, side, side)).shape == (3,)


def test_every_generator_is_in_the_table() -> None:
    assert list_generators() == [f"{kind}_gen_{of}" for of in ("64", "micro") for kind in ("nest", "plane", "conv")]
