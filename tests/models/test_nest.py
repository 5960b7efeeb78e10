"""NesT's parts: sizes, counts, aggregation, attention, initialisation, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models import (
    ModelError,
    create_model,
    list_models,
    model_info,
    num_drop_paths,
    set_drop_path_noise,
)
from pipeline.models.aggregate import Aggregate
from pipeline.models.attention import Attention
from pipeline.models.blocks import blockify, unblockify
from pipeline.models.facts import count_macs, count_params, model_facts

COUNTS = [
    # model, classes, parameters, multiply-adds in units of 10^9 as the fact sheet prints them
    ("nest_tiny", 1000, 17_057_608, 5.807),
    ("nest_small", 1000, 38_351_176, 10.323),
    ("nest_base", 1000, 67_723_368, 17.926),
    ("nest_tiny_cifar", 10, 6_006_730, 2.076),
    ("nest_tiny_cifar", 100, 6_024_100, 2.076),
    ("nest_small_cifar", 10, 22_849_930, 8.052),
    ("nest_small_cifar", 100, 22_884_580, 8.052),
    ("nest_base_cifar", 10, 89_050_378, 31.70),
    ("nest_base_cifar", 100, 89_119_588, 31.70),
]
PARTS = {
    # patch embedding, position embeddings, encoder per level, aggregation, final norm, head
    "nest_tiny": (4_704, 526_848, (223_680, 889_728, 14_195_712), 831_168, 768, 385_000),
    "nest_small": (4_704, 526_848, (223_680, 889_728, 35_489_280), 831_168, 768, 385_000),
    "nest_base": (6_272, 702_464, (396_544, 1_579_520, 63_047_680), 1_476_864, 1_024, 513_000),
    "nest_tiny_cifar": (768, 261_120, (1_186_368,) * 4, 997_056, 384, 1_930),
    "nest_small_cifar": (1_536, 522_240, (4_584_192,) * 4, 3_984_768, 768, 3_850),
    "nest_base_cifar": (3_072, 1_044_480, (18_015_360,) * 4, 15_932_160, 1_536, 7_690),
}


def on_meta(name: str, **overrides) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **overrides)


@pytest.mark.parametrize(("name", "classes", "params", "gmacs"), COUNTS)
def test_parameters_and_macs(name, classes, params, gmacs):
    facts = model_facts(name, num_classes=classes)
    assert facts.params == params
    assert facts.macs / 1e9 == pytest.approx(gmacs, abs=0.005 if gmacs == 31.70 else 0.0005)


@pytest.mark.parametrize("name", PARTS)
def test_parameters_of_each_part(name):
    model = on_meta(name)
    assert (
        count_params(model.patch_embed),
        sum(level.pos_embed.numel() for level in model.levels),
        tuple(count_params(level.layers) for level in model.levels),
        sum(count_params(level.aggregate) for level in model.levels),
        count_params(model.norm),
        count_params(model.head),
    ) == PARTS[name]


def macs_by_hand(config: dict) -> int:
    """Every product of the forward pass, summed from the variant's table row."""
    levels, patch = config["num_levels"], config["patch_size"]
    dims, depths, heads = (
        (value,) * levels if isinstance(value, int) else value
        for value in (config["embed_dims"], config["depths"], config["num_heads"])
    )
    tokens = (config["img_size"] // patch) ** 2
    n = tokens // 4 ** (levels - 1)
    macs = tokens * 3 * patch**2 * dims[0]
    for i, (d, depth, h) in enumerate(zip(dims, depths, heads, strict=True)):
        kv = d // h if config.get("attention") == "mqa" else d
        macs += depth * tokens * (d * (d + 2 * kv) + d * d + 8 * d * d + 2 * n * d)
        if i + 1 < levels:
            macs += tokens * 9 * d * dims[i + 1]
            tokens //= 4
    return macs + dims[-1] * config["num_classes"]


@pytest.mark.parametrize("name", list_models("nest_*"))
def test_macs_to_the_last_one(name):
    assert model_facts(name).macs == macs_by_hand(dict(model_info(name).config))


def test_counting_leaves_the_model_as_it_was():
    model = create_model("nest_micro").train()
    model.levels[0].eval()
    set_drop_path_noise(model, torch.rand(2, num_drop_paths(model)))
    before = {name: module.training for name, module in model.named_modules()}
    assert count_macs(model) == model_facts("nest_micro").macs
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_decayed_parameters_are_all_but_the_position_embeddings():
    model = on_meta("nest_tiny")
    skipped = model.no_weight_decay()
    assert skipped == {name for name, _ in model.named_parameters() if "pos_embed" in name}
    assert sum(p.numel() for name, p in model.named_parameters() if name not in skipped) == 16_530_760


def test_blockify_order_and_inverse():
    plane = torch.arange(36).reshape(1, 6, 6, 1)
    blocks = blockify(plane, 2)
    assert blocks[0, :2, :, 0].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert blocks[0, 8, :, 0].tolist() == [28, 29, 34, 35]
    assert torch.equal(unblockify(blocks), plane)
    x = torch.randn(2, 12, 12, 5)
    assert torch.equal(unblockify(blockify(x, 3)), x)


@pytest.mark.parametrize("side", [2, 4, 6, 14])
@pytest.mark.parametrize(("pool_pad", "before"), [("same", 0), ("symmetric", 1)])
def test_aggregation_pools_over_the_stated_windows(side, pool_pad, before):
    torch.manual_seed(side)
    aggregate = Aggregate("conv_pool", 3, 5, "image", 2, pool_pad).double()
    x = torch.randn(2, side, side, 3, dtype=torch.float64, requires_grad=True)
    normed = aggregate.norm(aggregate.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    padded = F.pad(normed.permute(0, 3, 1, 2), (before, 1, before, 1), value=-torch.inf)
    windows = [
        padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].amax((2, 3))
        for i in range(side // 2)
        for j in range(side // 2)
    ]
    expected = torch.stack(windows, 1).reshape(2, side // 2, side // 2, 5)
    assert torch.equal(aggregate(x), expected)
    weight = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x, retain_graph=True)
    (got,) = torch.autograd.grad((aggregate(x) * weight).sum(), x)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("multi_query", [False, True])
@pytest.mark.parametrize("lead", [(2,), (2, 3)])
def test_attention_is_softmax_attention(multi_query, lead):
    torch.manual_seed(0)
    attn = Attention(12, 3, multi_query=multi_query).double()
    x = torch.randn(*lead, 5, 12, dtype=torch.float64)
    qkv = F.linear(x, attn.qkv.weight, attn.qkv.bias)
    heads = []
    for h in range(3):
        kv_head = 0 if multi_query else h
        q = qkv[..., 4 * h : 4 * h + 4]
        k = qkv[..., 12 + 4 * kv_head :][..., :4]
        v = qkv[..., (16 if multi_query else 24) + 4 * kv_head :][..., :4]
        heads.append((q @ k.mT / 4**0.5).softmax(-1) @ v)
    expected = F.linear(torch.cat(heads, -1), attn.proj.weight, attn.proj.bias)
    torch.testing.assert_close(attn(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("multi_query", [False, True])
def test_attention_takes_the_fused_kernel(multi_query):
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        Attention(12, 3, multi_query=multi_query)(torch.randn(2, 3, 5, 12))
    assert any("_scaled_dot_product_flash_attention" in name for name in called)
    assert not any("softmax" in name for name in called)


@torch.no_grad()
def test_blocks_are_independent_until_the_aggregation():
    """A changed block alters itself alone at the first level; then it leaks by the radius of convolution and pool."""
    torch.manual_seed(0)
    model = create_model("nest_micro").eval()
    images = torch.randn(1, 3, 16, 16)
    changed = images.clone()
    changed[:, :, 4:8, 4:8] += torch.randn(3, 4, 4)  # the block in row 1, column 1
    planes = [model.patch_embed(x).permute(0, 2, 3, 1) for x in (images, changed)]
    first = [model.levels[0](x) for x in planes]
    touched = (first[0] != first[1]).any(-1)[0]
    assert touched[4:8, 4:8].all()
    assert touched.sum() == 16
    pooled = [model.levels[1].aggregate(x) for x in first]
    touched = (pooled[0] != pooled[1]).any(-1)[0]
    # Tokens 4..7 reach 3..8 through the convolution; window i of the pool covers 2i..2i+2.
    assert touched.nonzero().amin(0).tolist() == [1, 1]
    assert touched.nonzero().amax(0).tolist() == [4, 4]  # outside the 2x2 parent, which ends at 3


def test_position_embeddings_start_and_differ_per_block():
    model = create_model("nest_micro")
    assert [tuple(level.pos_embed.shape) for level in model.levels] == [(1, 16, 16, 32), (1, 4, 16, 64), (1, 1, 16, 96)]
    assert not torch.equal(model.levels[0].pos_embed[0, 0], model.levels[0].pos_embed[0, 1])


@pytest.mark.parametrize(
    ("init", "reference"), [("official", stats.truncnorm(-2, 2, scale=0.02)), ("timm", stats.norm(scale=0.02))]
)
def test_initial_weights_follow_the_stated_distribution(init, reference):
    torch.manual_seed(3)
    model = create_model("nest_micro", init=init)
    for name, param in model.named_parameters():
        if param.ndim > 1:
            assert stats.kstest(param.detach().flatten()[:4000].numpy(), reference.cdf).pvalue > 1e-3, name
        else:
            assert torch.equal(param, torch.full_like(param, 0.0 if name.endswith("bias") else 1.0)), name
    largest = max(p.abs().max().item() for p in model.parameters() if p.ndim > 1)
    assert largest <= 0.04 if init == "official" else largest > 0.07


def test_dropout_rates_reach_their_places():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    plain = create_model("nest_micro", drop_path_rate=0.0)
    for option in ("drop_rate", "attn_drop_rate"):
        model = create_model("nest_micro", drop_path_rate=0.0, **{option: 0.2})
        model.load_state_dict(plain.state_dict())
        assert not torch.equal(model.train()(images), model(images))
        assert torch.equal(model.eval()(images), plain.eval()(images))


def test_features_and_pre_logits():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    model = create_model("nest_micro").eval()
    features = model.forward_features(images)
    assert features.shape == (2, 16, 96)
    pooled = features.mean(1)
    assert torch.equal(model.forward_head(features, pre_logits=True), pooled)
    assert torch.equal(model(images), model.head(pooled))
    headless = create_model("nest_micro", num_classes=0).eval()
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head")})
    assert torch.equal(headless(images), pooled)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("nest_tiny", {"img_size": 200}, r"img_size=200 .* = 16; nearest: 192 or 208"),
        ("nest_tiny", {"img_size": 8}, r"img_size=8 .*; nearest: 16"),
        ("nest_tiny", {"img_size": 0}, r"img_size=0 is not a positive integer"),
        ("nest_tiny", {"img_size": "224"}, r"img_size='224' is not a positive integer"),
        ("nest_tiny_cifar", {"img_size": 36}, r"multiple of patch_size \* 2\^\(num_levels-1\) = 8; nearest: 32 or 40"),
        ("nest_tiny", {"num_levels": 4}, r"num_heads has 3 entries for num_levels=4"),
        ("nest_tiny", {"depths": (2, 2)}, r"depths has 2 entries for num_levels=3"),
        ("nest_tiny", {"depths": (2, -1, 2)}, r"depths=\(2, -1, 2\) holds something else than integers of at least 0"),
        ("nest_tiny", {"embed_dims": (96.0, 192, 384)}, r"embed_dims=.* integers of at least 1"),
        ("nest_micro", {"num_heads": 5}, r"5 heads don't divide 32 channels"),
        ("nest_micro", {"drop_path_rate": 1.0}, r"drop_path_rate=1.0 is not in \[0, 1\)"),
        ("nest_micro", {"drop_path_rate": -0.1}, r"drop_path_rate=-0.1 is not in \[0, 1\)"),
        ("nest_micro", {"attention": "gqa"}, r"attention='gqa' is not one of 'mha', 'mqa'"),
        ("nest_micro", {"gelu": "none"}, r"gelu='none' is not one of 'tanh', 'erf'"),
        ("nest_micro", {"pool_pad": "valid"}, r"pool_pad='valid' is not one of 'same', 'symmetric'"),
        ("nest_micro", {"init": "zeros"}, r"init='zeros' is not one of 'official', 'timm'"),
    ],
)
def test_impossible_options_are_explained(name, overrides, message):
    with pytest.raises(ModelError, match=message):
        on_meta(name, **overrides)


@pytest.mark.parametrize("shape", [(1, 3, 20, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ModelError, match=r"takes images of shape \(3, 16, 16\), got"):
        create_model("nest_micro")(torch.zeros(shape))


@pytest.mark.parametrize("name", [name for name in list_models("nest_*") if name != "nest_micro"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"img_size": 64, "num_levels": 2, "embed_dims": (24, 48), "depths": (0, 1), "num_heads": 3},
        {
            "img_size": 64,
            "in_chans": 1,
            "patch_size": 2,
            "embed_dims": 24,
            "depths": 1,
            "num_heads": 2,
            "mlp_ratio": 1.5,
        },
    ],
)
def test_every_size_can_be_overridden(name, overrides):
    model = create_model(name, **overrides, num_classes=3, drop_path_rate=0.4).eval()
    images = torch.randn(1, overrides.get("in_chans", 3), 64, 64)
    assert model(images).shape == (1, 3)
    assert model.levels[-1].layers[0].mlp.fc1.out_features == int(
        model.norm.normalized_shape[0] * overrides.get("mlp_ratio", 4)
    )
    assert len(model.levels) == overrides.get("num_levels", len(on_meta(name).levels))
