"""Option values that no model can take: one message that names the option, never another exception."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.models import ModelError, create_model, resize_pos_embed

MODELS = {"nest": "nest_micro", "hvt": "hvt_ti_1", "refiner": "refiner_vit_s", "deit": "deit_tiny"}
THREE = {"dims": 2, "stride": [2, 2, 2]}
POSITIVE = (0, -1, 1.5, "3", True, [2])
BAD: dict[str, tuple[Any, ...]] = {
    "img_size": POSITIVE,
    "in_chans": POSITIVE,
    "patch_size": POSITIVE,
    "depth": POSITIVE,
    "embed_dim": POSITIVE,
    "head_dim": POSITIVE,
    "num_levels": POSITIVE,
    "num_classes": (-1, 2.0, "10", True),
    "num_heads": (0, -1, 1.5, "3", True),
    "embed_dims": (0, "wide", [1, 2], [8, 12, True], {"a": 1}),
    "depths": (-1, "deep", [1]),
    "mlp_ratio": (0, -1, "fast", math.inf, math.nan, True, 1e-9),
    "drop_path_rate": (1, -0.1, "x", True, math.nan),
    "drop_rate": (1, -0.1, "x", True),
    "attn_drop_rate": (2, "0.x"),
    "residual_scale": (0, -1, "x"),
    "layer_scale": (-1, "x", math.nan),
    "aux_weight": ("x", math.inf),
    "aux_head": ("no", 1),
    "pool_pos_embed": ("no",),
    "reduction": ("no",),
    "sharing": ("no", 1),
    "refine": (3, {"reduction": "no"}, {"expansion": 1.5}, {"blocks": "all"}, {"sharing": 2}),
    "pool": ({"after": 3}, {"after": ["a"]}, {"stride": "x"}, {"stride": []}, {"stages": True}, THREE),
    "pool_stride": (0, "x", [2, 2], 1.5),
    "pool_after": (3, ["a"], [1, 0]),
    "pos_embed": ("all",),
    "kernels": ("cuda", 1),
    "blocks": (3, [99], ["a"]),
}  # fmt: skip


def cases() -> list[tuple[str, str, Any]]:
    from inspect import signature

    from pipeline.models import model_info

    options = {family: signature(model_info(name).build).parameters for family, name in MODELS.items()}
    return [(f, option, v) for option, values in BAD.items() for f in MODELS if option in options[f] for v in values]


def test_every_case_is_of_some_model() -> None:
    assert {option for _, option, _ in cases()} == BAD.keys()


@pytest.mark.parametrize(("family", "option", "value"), cases())
def test_bad_values_are_named(family: str, option: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(ModelError) as caught:
        create_model(MODELS[family], **{option: value})
    assert option.removeprefix("pool_") in str(caught.value) or (family, option) == ("hvt", "head_dim")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1, 0.5, 0])
def test_layer_scale_may_be_any_number(value: float) -> None:
    model = create_model("refiner_vit_s", depth=2, layer_scale=value)
    assert [model.blocks[0].mlp.scale.unique().item()] == [value] if value else model.blocks[0].mlp.scale is None


def test_one_stride_stands_for_both_sides() -> None:
    one, two = (create_model("hvt_ti_1", pool_dims=2, pool_stride=stride) for stride in ([2], [2, 2]))
    assert one.pools["0"].pos_embed.shape == two.pools["0"].pos_embed.shape


def test_sharing_that_shares_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match=r"refine.sharing=true needs two layers"):
        create_model("nest_micro", depths=1, refine={"sharing": True})


HVT = {"img_size": 32, "patch_size": 4, "num_heads": 2, "head_dim": 8, "depth": 4, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "options", "old", "new"),
    [
        ("hvt_ti_1", HVT, {"pool_stride": 3}, {}),
        ("hvt_ti_1", HVT, {"pool_kernel": 9}, {}),
        ("hvt_ti_1", HVT, {"pool_dims": 2}, {}),
        ("hvt_ti_1", HVT, {}, {"pool_dims": 2}),
        ("nest_micro", {}, {"pos_embed": "shared"}, {}),
        ("nest_micro", {}, {}, {"pos_embed": "shared"}),
    ],
)
def test_positions_of_another_configuration_are_not_stretched(name: str, options: Any, old: Any, new: Any) -> None:
    state = create_model(name, **options, **old).state_dict()
    with pytest.raises(ModelError, match=r"pos_embed of shape .* can't be resized to"):
        resize_pos_embed(state, create_model(name, **options, **new))


def test_damaged_position_embeddings_are_refused() -> None:
    model = create_model("hvt_ti_1", **HVT)
    state = model.state_dict()
    larger = create_model("hvt_ti_1", **(HVT | {"img_size": 64}))
    for damage in (torch.zeros(1, 0, 16), torch.zeros(16), torch.zeros(1, 63, 16)):
        with pytest.raises(ModelError, match="can't be resized"):
            resize_pos_embed(state | {"pos_embed": damage}, larger)
    del state["pos_embed"]
    with pytest.raises(ModelError, match="can't be resized"):
        resize_pos_embed(state, larger)
