"""HVT: counts of the fact sheet, pooling against slow definitions, its switches, DeiT as HVT without pools."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from pipeline.models import ModelError, create_model, load_official, resize_pos_embed
from pipeline.models.facts import count_macs_ptflops, count_params
from pipeline.models.pool import Pool

COUNTS = [
    ("hvt_ti_0", 5_717_032, 5_543_332, 1_246_623_208),
    ("hvt_ti_1", 5_735_656, 5_561_956, 642_396_520),
    ("hvt_ti_2", 5_744_872, 5_571_172, 520_393_384),
    ("hvt_ti_3", 5_749_288, 5_575_588, 436_371_496),
    ("hvt_ti_4", 5_751_400, 5_577_700, 377_559_784),
    ("hvt_s_0", 22_049_896, 21_703_396, 4_574_144_488),
    ("hvt_s_1", 22_087_144, 21_740_644, 2_402_213_608),
    ("hvt_s_2", 22_105_576, 21_759_076, 1_941_447_016),
    ("hvt_s_3", 22_114_408, 21_767_908, 1_620_343_912),
    ("hvt_s_4", 22_118_632, 21_772_132, 1_393_897_960),
    ("hvt_b_0", 86_566_120, 85_874_020, 17_471_884_264),
    ("hvt_b_1", 86_640_616, 85_948_516, 9_274_112_488),
    ("hvt_b_4", 86_703_592, 86_011_492, 5_342_912_488),
    ("deit_tiny", 5_717_416, None, 1_253_742_568),
    ("deit_small", 22_050_664, None, 4_599_000_040),
    ("deit_base", 86_567_656, None, 17_564_062_696),
]
# HVT-*-4 with 100 classes: option, value -> parameters in millions and multiply-adds in 10^9, to three decimals
SCALED = {
    ("hvt_ti_4", "depth"): {12: (5.578, 0.377), 16: (7.357, 0.461), 20: (9.137, 0.545), 24: (10.916, 0.629)}
    | {28: (12.696, 0.713), 32: (14.475, 0.797), 36: (16.254, 0.881)},
    ("hvt_s_4", "depth"): {12: (21.772, 1.394), 16: (28.870, 1.720), 20: (35.968, 2.046), 24: (43.066, 2.372)}
    | {28: (50.164, 2.699), 32: (57.261, 3.025), 36: (64.359, 3.351)},
    ("hvt_ti_4", "num_heads"): {1: (0.680, 0.055), 2: (2.539, 0.181), 3: (5.578, 0.377), 4: (9.796, 0.645)}
    | {5: (15.194, 0.984), 6: (21.772, 1.394), 7: (29.530, 1.874), 8: (38.467, 2.426), 10: (59.880, 3.742)}
    | {12: (86.011, 5.342)},
    ("hvt_ti_4", "img_size"): {160: (5.542, 0.182), 192: (5.559, 0.271), 256: (5.600, 0.507), 288: (5.625, 0.659)}
    | {320: (5.654, 0.839), 384: (5.719, 1.289)},
    ("hvt_s_4", "img_size"): {160: (21.701, 0.685), 192: (21.734, 1.010), 256: (21.817, 1.854), 288: (21.867, 2.382)}
    | {320: (21.924, 2.996), 384: (22.055, 4.478)},
    ("hvt_ti_4", "patch_size"): {8: (5.686, 1.794), 14: (5.566, 0.498), 32: (5.966, 0.107)},
    ("hvt_s_4", "patch_size"): {8: (21.989, 6.179), 14: (21.748, 1.837), 32: (22.548, 0.368)},
}


@pytest.mark.parametrize(("name", "params", "params_100", "macs"), COUNTS)
def test_counts(name, params, params_100, macs):
    with torch.device("meta"):
        model = create_model(name)
        assert count_params(model) == params
        assert count_macs_ptflops(model) == macs
        if params_100 is not None:
            assert count_params(create_model(name, num_classes=100)) == params_100


@pytest.mark.parametrize(
    ("name", "option", "value", "params", "gmacs"),
    [(name, option, value, *facts) for (name, option), row in SCALED.items() for value, facts in row.items()],
)
def test_scaled_variants(name, option, value, params, gmacs):
    with torch.device("meta"):
        model = create_model(name, num_classes=100, **{option: value})
    assert f"{count_params(model) / 1e6:.3f}" == f"{params:.3f}"
    assert f"{count_macs_ptflops(model) / 1e9:.3f}" == f"{gmacs:.3f}"


@pytest.mark.parametrize(
    ("kernel", "lengths"), [(2, [98, 49, 24, 12]), (3, [97, 48, 23, 11]), (4, [97, 47, 22, 10]), (5, [96, 46, 21, 9])]
)
def test_lengths(kernel, lengths):
    assert [n for _, n in Pool(stages=4, kernel=kernel).grids(14, 12)] == lengths


def test_the_pools_are_where_the_stages_begin():
    expected = {0: (), 1: (0,), 2: (0, 6), 3: (0, 4, 8), 4: (0, 3, 6, 9), 6: (0, 2, 4, 6, 8, 10)}
    with torch.device("meta"):
        got = {n: create_model("hvt_ti_0", patch_size=8, stages=n).pooled_layers for n in expected}
    assert got == expected


@pytest.mark.parametrize("kind", ["max", "avg", "conv"])
@pytest.mark.parametrize(("dims", "kernel", "stride"), [(1, 3, 2), (1, 2, 3), (2, 3, 2), (2, 2, 2), (2, 3, (1, 2))])
def test_pools_are_what_they_say(kind, dims, kernel, stride):
    torch.manual_seed(0)
    side, dim = 6, 4
    pool = Pool(stages=1, kind=kind, kernel=kernel, stride=stride, dims=dims)
    [grid] = pool.grids(side, 1)
    module = pool.make(dim, (side, side) if dims == 2 else (1, side * side)).double()
    x = torch.randn(2, side * side, dim, dtype=torch.float64)
    rows, columns = (side, side) if dims == 2 else (1, side * side)
    pads = ((kernel - 1) // 2,) * 2 if dims == 2 else (0, 0)
    steps = (stride, stride) if isinstance(stride, int) else stride
    heights, widths = (kernel if dims == 2 else 1), kernel
    plane = x.reshape(2, rows, columns, dim)
    out = torch.zeros(2, *grid, dim, dtype=torch.float64)
    for i in range(grid[0]):
        for j in range(grid[1]):
            tops = range(i * steps[0] - pads[0], i * steps[0] - pads[0] + heights) if dims == 2 else range(1)
            lefts = range(j * steps[-1] - pads[1], j * steps[-1] - pads[1] + widths)
            inside = [(r, c) for r in tops for c in lefts if 0 <= r < rows and 0 <= c < columns]
            window = torch.stack([plane[:, r, c] for r, c in inside], dim=1)
            if kind == "max":
                out[:, i, j] = window.amax(1)
            elif kind == "avg":
                out[:, i, j] = window.mean(1)
            else:
                weight = module.conv.weight
                for r, c in inside:
                    w = weight[:, :, r - tops[0], c - lefts[0]] if dims == 2 else weight[:, :, c - lefts[0]]
                    out[:, i, j] += plane[:, r, c] @ w.T
                out[:, i, j] += module.conv.bias
    torch.testing.assert_close(module(x), out.flatten(1, 2), rtol=1e-12, atol=1e-12)


SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 4, "num_heads": 2, "head_dim": 8, "depth": 4, "num_classes": 5}


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"pool_kind": "avg"}, 0),
        ({"pool_kind": "conv"}, 2 * (3 * 16 * 16 + 16)),
        ({"pool_kernel": 5}, (30 + 13) * 16 - (31 + 15) * 16),
        ({"pool_stride": 3}, (21 + 7) * 16 - (31 + 15) * 16),
        ({"pool_dims": 2}, (16 + 4) * 16 - (31 + 15) * 16),
        ({"pool_dims": 2, "pool_stride": [1, 2]}, (32 + 16) * 16 - (31 + 15) * 16),
        ({"pool_pos_embed": False}, -(31 + 15) * 16),
        ({"head": "cls"}, 16 + 16),
        ({"stages": 4}, (7 + 3) * 16),
        ({"stages": 0}, -(31 + 15) * 16),
        ({"pool_after": [1, 3]}, 0),
    ],
)
def test_switches_change_parameters_or_output(options, change):
    torch.manual_seed(0)
    base = create_model("hvt_ti_2", **SMALL).eval()
    torch.manual_seed(0)
    model = create_model("hvt_ti_2", **(SMALL | options)).eval()
    assert count_params(model) - count_params(base) == change
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(model(images), base(images), atol=1e-4)


def test_hvt_without_pools_and_with_a_class_token_is_deit():
    torch.manual_seed(0)
    theirs = timm.create_model("deit_small_patch16_224", num_classes=7).eval()
    hvt = create_model("hvt_s_0", head="cls", num_classes=7).eval()
    hvt.load_state_dict(theirs.state_dict())
    deit = create_model("deit_small", num_classes=7).eval()
    load_official(deit, {"model": theirs.state_dict()})
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        wanted = theirs(images)
        assert torch.equal(deit(images), wanted)
        torch.testing.assert_close(hvt(images), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"pool_kind": "avg"}, {"pool_kind": "conv"}, {"head": "cls"}, {"refine": {"expansion": 3}}]
)
def test_official_weights_are_not_for_another_function(options):
    """An average has no weights, so that shapes alone would let them in."""
    weights = dict(create_model("hvt_ti_2", **SMALL).state_dict())
    weights = {name.replace("pools.", "blocks."): value for name, value in weights.items()}
    load_official(create_model("hvt_ti_2", **SMALL), weights)
    with pytest.raises(ModelError, match="the official HVT has max-pools, no class token and refines no attention"):
        load_official(create_model("hvt_ti_2", **SMALL, **options), weights)


@pytest.mark.parametrize("options", [{}, {"pool_dims": 2}, {"head": "cls"}, {"pool_kernel": 2}])
def test_positions_at_another_size_stay_where_they_are(options):
    """Embeddings that are a smooth function of the place in the image are that function at another size."""
    old, new = (create_model("hvt_ti_2", **(SMALL | {"img_size": size} | options)) for size in (128, 192))

    def function(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.sin(2 * row + i) + torch.cos(column - i) for i in range(16)], dim=-1)

    def smooth(model) -> dict[str, torch.Tensor]:
        side = model.img_size // model.patch_size
        state = dict(model.state_dict())
        for name in [n for n in state if n.endswith("pos_embed")]:
            extra = 1 if name == "pos_embed" and model.cls_token is not None else 0
            n = state[name].shape[1] - extra
            if name == "pos_embed":
                place = torch.arange(n).float()
            elif model.pool_options.dims == 1:
                step, first = model.pool_options.raster(model.pooled_layers.index(int(name.split(".")[1])) + 1)
                place = first + step * torch.arange(n)
            if name != "pos_embed" and model.pool_options.dims == 2:
                s = round(n**0.5)
                middle = (torch.arange(s) + 0.5) / s
                values = function(middle[:, None].expand(s, s), middle[None].expand(s, s)).flatten(0, 1)
            else:
                row = torch.floor(place / side)
                values = function((row + 0.5) / side, (place - row * side + 0.5) / side)
            state[name] = torch.cat([state[name][:, :extra], values[None]], dim=1)
        return state

    resized, wanted = resize_pos_embed(smooth(old), new), smooth(new)
    for name in [n for n in wanted if n.endswith("pos_embed")]:
        difference = (resized[name] - wanted[name]).abs()
        if name == "pos_embed":
            difference = difference[:, 0 if new.cls_token is None else 1 :]
        # Where a row ends, a pooled sequence averages both ends of the row.
        assert difference.median() < 0.02 and difference.quantile(0.8) < 0.15, name
    new.load_state_dict(resized)


def test_same_size_passes_through_and_resized_weights_load():
    for name in ("hvt_ti_4", "refiner_vit_s", "deit_tiny"):
        size = {"img_size": 64, "patch_size": 4} if name != "refiner_vit_s" else {"img_size": 64}
        with_depth = {"depth": 4}
        old = create_model(name, **size, **with_depth)
        new = create_model(name, **(size | {"img_size": 96}), **with_depth)
        state = old.state_dict()
        same = resize_pos_embed(state, old)
        assert all(same[key] is state[key] for key in state)
        new.load_state_dict(resize_pos_embed(state, new))
        token = "vit.pos_embed" if name == "deit_tiny" else "pos_embed"
        if name != "hvt_ti_4":
            assert torch.equal(new.state_dict()[token][:, 0], state[token][:, 0])
        grid = state[token][:, 1:] if name != "hvt_ti_4" else state[token]
        side, wanted = (4, 6) if name == "refiner_vit_s" else (16, 24)
        plane = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        plane = F.interpolate(plane, (wanted, wanted), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
        got = new.state_dict()[token]
        torch.testing.assert_close(got[:, got.shape[1] - wanted**2 :], plane)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 30}, "img_size=30 is not a multiple of patch_size=4; nearest: 28 or 32"),
        ({"stages": 3}, "4 layers can't be cut into 3 equal stages"),
        ({"pool_after": [4]}, "give rising layer numbers from 0 to 3"),
        ({"stages": 4, "img_size": 8}, "tokens after layer .* are fewer than the 3 of a pooling window"),
        ({"pool_kind": "median"}, "pool.kind='median' is not one of"),
        ({"pool_stride": [1, 2]}, "pool.stride=.1, 2.: give one number, or set pool.dims=2"),
        ({"pool_kernel": 0}, "pool.kernel=0 is not a positive integer"),
        ({"head": "gap"}, "head='gap' is not one of"),
        ({"num_heads": 0}, "num_heads=0 is not a positive integer"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ModelError, match=message):
        create_model("hvt_ti_2", **(SMALL | options))
