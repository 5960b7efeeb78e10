"""NesT's aggregations: each against its definition, what crosses block borders, and the other ablations."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from pipeline.models import ModelError, create_model
from pipeline.models.aggregate import Aggregate
from pipeline.models.facts import count_macs, count_params

KINDS = ["conv_pool", "conv", "patch_merge", "max2", "max3", "avg2", "avg3"]


def randomised(kind: str, plane: str = "image", pad: str = "same", dims: tuple[int, int] = (3, 5)) -> Aggregate:
    torch.manual_seed(1)
    module = Aggregate(kind, *dims, plane, 2, pad).double()
    for param in module.parameters():
        torch.nn.init.normal_(param)
    return module


def defined(module: Aggregate, x: torch.Tensor, before: int) -> torch.Tensor:
    """Window by window, for one image of shape (H, W, C)."""
    kind, side = module.kind, x.shape[0]
    norm = module.norm
    if kind == "patch_merge":
        rows = [
            [torch.cat([x[2 * i, 2 * j], x[2 * i, 2 * j + 1], x[2 * i + 1, 2 * j], x[2 * i + 1, 2 * j + 1]])
             for j in range(side // 2)] for i in range(side // 2)
        ]  # fmt: skip
        return torch.stack([torch.stack([module.conv(norm(v)) for v in row]) for row in rows])
    if kind == "conv":
        weight, bias = module.conv.weight, module.conv.bias
        padded = F.pad(x, (0, 0, 0, 1, 0, 1))
        windows = padded.unfold(0, 3, 2).unfold(1, 3, 2)  # (h, w, C, 3, 3)
        return norm(torch.einsum("hwcab,ocab->hwo", windows, weight) + bias)
    x = module.conv(x.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    x = norm(x)
    size = 2 if kind.endswith("2") else 3
    out = []
    for i, j in itertools.product(range(side // 2), repeat=2):
        places = [range(2 * n - before, 2 * n - before + size) for n in (i, j)]
        inside = [x[r, c] for r in places[0] for c in places[1] if 0 <= r < side and 0 <= c < side]
        window = torch.stack(inside)
        out.append(window.mean(0) if kind.startswith("avg") else window.amax(0))
    return torch.stack(out).unflatten(0, (side // 2, -1))


@torch.no_grad()
@pytest.mark.parametrize("pad", ["same", "symmetric"])
@pytest.mark.parametrize("dims", [(3, 5), (4, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_aggregation_is_its_definition(kind, dims, pad):
    if pad == "symmetric" and kind not in ("conv_pool", "max3", "avg3"):
        with pytest.raises(ModelError, match=f"aggregation={kind} has none"):
            randomised(kind, pad=pad)
        return
    module = randomised(kind, pad=pad, dims=dims)
    x = torch.randn(2, 8, 8, dims[0], dtype=torch.float64)
    before = 1 if pad == "symmetric" else 0
    wanted = torch.stack([defined(module, image, before) for image in x])
    torch.testing.assert_close(module(x), wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_block_plane_keeps_to_its_parent_and_image_plane_does_not(kind):
    """Change the first block of the group in rows 4-7, columns 8-11: on the block plane only the group notices."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 16, 3, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:6, 8:10] = 9 * torch.randn(1, 2, 2, 3, dtype=torch.float64)
    differs = {}
    for plane in ("image", "block"):
        module = randomised(kind, plane)
        differs[plane] = (module(changed) - module(x)).abs().amax(-1)[0] > 0
    parent = torch.zeros(8, 8, dtype=torch.bool)
    parent[2:4, 4:6] = True
    assert differs["block"][parent].any() and not differs["block"][~parent].any()
    local = kind in ("patch_merge", "max2", "avg2")
    assert bool(differs["image"][~parent].any()) is not local
    if local:  # windows that never cross a border see the same on both planes
        assert torch.equal(randomised(kind, "image")(x), randomised(kind, "block")(x))


MICRO = {"depths": 1, "embed_dims": (8, 12, 16), "num_heads": (1, 2, 2), "num_classes": 5}
CONVS = 9 * 8 * 12 + 12 + 9 * 12 * 16 + 16  # of conv_pool
LINEAR = 8 * 12 + 12 + 12 * 16 + 16
NORMS = 2 * 12 + 2 * 16
ABLATIONS = [
    ({"aggregation": "conv"}, 0),
    ({"aggregation": "patch_merge"}, 4 * 8 * 12 + 4 * 12 * 16 + 2 * 4 * (8 + 12) - CONVS - NORMS),
    ({"aggregation": "max2"}, LINEAR - CONVS),
    ({"aggregation": "max3"}, LINEAR - CONVS),
    ({"aggregation": "avg2"}, LINEAR - CONVS),
    ({"aggregation": "avg3"}, LINEAR - CONVS),
    ({"aggregation_plane": "block"}, 0),
    ({"pos_embed": "shared"}, -(15 * 8 + 3 * 12) * 16),
    ({"attention": "mqa"}, -2 * ((12 * 13) + (16 * 17)) // 2),
    ({"num_levels": 2, "embed_dims": (12, 16), "num_heads": 2}, None),
    ({"refine": {"expansion": 2}}, (1 * 2 * 2 + 9 * 2) + 2 * (2 * 4 * 2 + 9 * 4)),
    ({"refine": {"expansion": 2, "blocks": [2], "kernel": 1}}, 2 * 4 * 2 + 4),
    ({"refine": {"flavour": "official"}}, (6 + 27 + 2 * (6 + 2)) + 2 * (24 + 54 + 2 * (12 + 4))),
    ({"depths": 2, "refine": {"sharing": True}}, None),
]


@pytest.mark.parametrize(("options", "change"), ABLATIONS)
def test_every_switch_changes_parameters_or_output(options, change):
    torch.manual_seed(0)
    base = create_model("nest_micro", **(MICRO | {k: v for k, v in options.items() if k == "depths"})).eval()
    torch.manual_seed(0)
    model = create_model("nest_micro", **(MICRO | options)).eval()
    if change is not None:
        assert count_params(model) - count_params(base) == change
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert not torch.allclose(model(images), base(images), atol=1e-5)


def test_levels_cut_the_image_into_blocks():
    for levels, blocks in ((1, [1]), (2, [4, 1]), (3, [16, 4, 1]), (4, [64, 16, 4, 1])):
        model = create_model("nest_micro", num_levels=levels, embed_dims=8, num_heads=1, depths=1)
        assert [level.pos_embed.shape[1] for level in model.levels] == blocks
        assert model.levels[0].pos_embed.shape[2] == (16 // 2 ** (levels - 1)) ** 2


def test_sharing_in_nest_stays_in_its_level():
    """Every second layer of a level has no queries and keys; the maps of a level fit its own blocks only."""
    options = MICRO | {"depths": (3, 2, 1), "refine": {"sharing": True}}
    model = create_model("nest_micro", **options)
    shared = [[getattr(layer.attn, "shared", False) for layer in level.layers] for level in model.levels]
    assert shared == [[False, True, False], [False, True], [False]]
    plain = create_model("nest_micro", **(MICRO | {"depths": (3, 2, 1)}))
    saved = 2 * (8 * 8 + 8) + 2 * (12 * 12 + 12)
    refiners = sum(p.numel() for n, p in model.named_parameters() if ".refiner." in n)
    assert count_params(model) == count_params(plain) - saved + refiners
    assert count_macs(model) != count_macs(plain)


COMBINATIONS = [
    ("nest_micro", MICRO | {"refine": {"expansion": 2}}),
    ("nest_micro", MICRO | {"attention": "mqa", "refine": {"kernel": 5}}),
    ("nest_micro", MICRO | {"depths": 2, "refine": {"flavour": "official", "sharing": True}}),
    ("nest_micro", MICRO | {"refine": {"reduction": False, "expansion": 2}}),
    ("hvt_ti_2", {"img_size": 32, "patch_size": 4, "num_heads": 2, "head_dim": 8, "depth": 4, "refine": {}}),
    ("hvt_ti_2", {"img_size": 32, "patch_size": 4, "num_heads": 2, "head_dim": 8, "depth": 6}
     | {"refine": {"flavour": "official", "sharing": True}}),
    ("refiner_vit_s", {"img_size": 64, "patch_size": 8, "embed_dim": 24, "num_heads": 4, "depth": 4}
     | {"pool": {"stages": 2}}),
    ("refiner_vit_s_linear", {"img_size": 64, "patch_size": 8, "embed_dim": 24, "num_heads": 4, "depth": 4}
     | {"pool": {"after": [1], "dims": 2, "kind": "avg"}, "stem": "patch", "layer_scale": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), COMBINATIONS)
def test_combinations_train_and_compile(name, options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = create_model(name, **options, drop_path_rate=0.0).train()
    images = torch.randn(3, 3, model.img_size, model.img_size)
    model(images).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
