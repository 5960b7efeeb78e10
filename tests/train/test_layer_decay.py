"""Layer-wise decay of the learning rate: the layer that a parameter belongs to, groups, checkpoints.

The engines' losses against a plain loop, on two processes, are in `test_engines.py`; the memory in `test_forecast.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch.summary import summary
from launch.workers import Nodes
from pipeline.config import OptimConfig
from pipeline.config_load import load_config
from pipeline.errors import UserError
from pipeline.models import create_model, list_models, model_info
from pipeline.models.bert import Bert
from pipeline.models.bert_options import BertOptions
from pipeline.models.errors import ModelError
from pipeline.models.layer_numbers import layer_numbers
from pipeline.models.layers import EncoderLayer
from pipeline.resolve import resolve
from pipeline.tracking.run_dir import RunDir
from pipeline.train.optim import decay_groups, make_optimizer
from pipeline.train.same_run import check_same_run
from tests.train.process_group import leave_process_group
from tests.train.test_engines import ENGINES, engine_alone, train_on_ones


@pytest.fixture(autouse=True, scope="module")
def leave_group() -> Iterator[None]:
    """As in `test_engines.py`."""
    yield
    leave_process_group()


# --- which layer: by the names of the parameters, which `layer_numbers` doesn't look at


def of_nest(name: str, depths: tuple[int, ...]) -> int:
    layers = sum(depths)
    if not name.startswith("levels."):
        return 0 if name.startswith("patch_embed.") else layers + 1
    _, level, what, *rest = name.split(".")
    before = sum(depths[: int(level)])
    if what == "layers":
        return before + int(rest[0]) + 1
    # A level's aggregation and positions: with the next layer there is. What precedes all layers is 0.
    return 0 if before == 0 else before + 1


def of_tokens(name: str, layers: int) -> int:
    """HVT, Refiner, DeiT."""
    name = name.removeprefix("vit.")
    if name in ("pos_embed", "cls_token") or name.startswith("patch_embed."):
        return 0
    part, number = name.split(".")[:2]
    return {"blocks": 1, "pools": 2}[part] + int(number) if part in ("blocks", "pools") else layers + 1


def of_bert(name: str, layers: int) -> int:
    found = re.match(r"bert\.encoder\.layer\.(\d+)\.", name)
    return int(found[1]) + 1 if found else 0 if name.startswith("bert.embeddings.") else layers + 1


def image_model(name: str, **overrides: Any) -> tuple[nn.Module, Callable[[str], int], int]:
    """The model, the layer of a parameter, the number of layers."""
    config = model_info(name).config | overrides
    model = create_model(name, **overrides)
    if model_info(name).family == "nest":
        depths = config["depths"]
        depths = (depths,) * config["num_levels"] if isinstance(depths, int) else tuple(depths)
        return model, lambda n: of_nest(n, depths), sum(depths)
    return model, lambda n: of_tokens(n, config["depth"]), config["depth"]


def bert(**options: Any) -> tuple[nn.Module, Callable[[str], int], int]:
    model = Bert(BertOptions.of("bert_tiny", {"layers": 3, "vocab_size": 50, "num_classes": 2, **options}))
    return model, lambda name: of_bert(name, 3), 3


REFINE = {"flavour": "official", "expansion": 2, "kernel": 3}
MODELS: dict[str, Callable[[], tuple[nn.Module, Callable[[str], int], int]]] = {
    **{name: lambda name=name: image_model(name) for name in list_models()},  # type: ignore[misc]
    "a level without layers": lambda: image_model("nest_micro", depths=(2, 0, 1)),
    "no layers at first": lambda: image_model("nest_micro", depths=(0, 2, 1)),
    "no layers at last": lambda: image_model("nest_micro", depths=(1, 2, 0)),
    "refined levels": lambda: image_model("nest_micro", refine=REFINE, aggregation="conv_pool", pos_embed="shared"),
    "pools with weights": lambda: image_model("hvt_ti_4", pool_kind="conv", head="cls"),
    "a pool at last": lambda: image_model("hvt_ti_1", pool_kind="conv", pool_after=(3, 11), refine=REFINE),
    "refiners and pools": lambda: image_model("refiner_vit_s", depth=4, pool={"stages": 2}, stem="patch"),
    "no heads": lambda: image_model("refiner_vit_s", depth=4, num_classes=0),
    "bert": bert,
    "refined bert": lambda: bert(refine=REFINE),
}


@pytest.mark.parametrize("case", MODELS)
def test_every_parameter_is_of_one_layer_and_one_group(case: str) -> None:
    with torch.device("meta"):
        model, layer_of, layers = MODELS[case]()
    names = [name for name, _ in model.named_parameters()]
    expected = {name: layer_of(name) for name in names}
    assert layer_numbers(model) == expected
    assert set(expected.values()) == set(range(layers + 2))

    config = OptimConfig(lr=2e-3, weight_decay=0.07, decay="matrices", layer_decay=0.65)
    optimizer = make_optimizer(model, config, 2e-3)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    decayed, _ = decay_groups(model, "matrices")
    found = [(name_of[p], group) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names), "each in one group"
    for name, group in found:
        assert group["lr"] == pytest.approx(2e-3 * math.pow(0.65, layers + 1 - expected[name]), rel=1e-12), name
        assert group["weight_decay"] == (0.07 if name in decayed else 0.0), name
    assert len(optimizer.param_groups) <= 2 * (layers + 2)


def test_the_rates_of_timm() -> None:
    """timm counts its final norm to the last layer, BEiT and this package to the heads; everything else is the same."""
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        model = create_model("deit_tiny")
    config = OptimConfig(lr=1.0, weight_decay=0.05, decay="matrices", layer_decay=0.75)
    ours = {
        p: (g["lr"], g["weight_decay"]) for g in make_optimizer(model, config, 1.0).param_groups for p in g["params"]
    }
    theirs = param_groups_layer_decay(
        model.vit, 0.05, no_weight_decay_list=model.vit.no_weight_decay(), layer_decay=0.75
    )
    norm = [*model.vit.norm.parameters()]
    for group in theirs:
        for parameter in group["params"]:
            scale = 1.0 if any(parameter is other for other in norm) else group["lr_scale"]
            assert ours.pop(parameter) == (pytest.approx(scale, rel=1e-12), group["weight_decay"])
    assert not ours


@pytest.mark.parametrize(("change", "words"), [("left out", "leaves out head.weight"), ("twice", "twice")])
@pytest.mark.parametrize("layers_too", [False, True])
def test_an_order_with_a_fault_is_no_order(
    change: str, words: str, layers_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_model("nest_micro", depths=1)
    parts = model.in_order()
    if layers_too and change == "left out":
        # The layers of a level as one part: their parameters are all there, but they are not counted.
        layer = next(part for part in parts if isinstance(part, EncoderLayer))
        parts[parts.index(layer)] = nn.ModuleList([layer])
        words = "leaves out an encoder layer"
    elif change == "left out":
        parts = [part for part in parts if part is not model.head]
    else:
        parts.append(parts[2] if layers_too else model.patch_embed.weight)
    monkeypatch.setattr(model, "in_order", lambda: parts)
    with pytest.raises(ModelError, match=words):
        layer_numbers(model)


# --- without it, everything as before


def test_one_leaves_the_groups_as_they_are() -> None:
    model = create_model("hvt_ti_1", img_size=64)
    config = OptimConfig(lr=1e-3, weight_decay=0.07, decay="matrices")
    assert config.layer_decay == 1
    groups = make_optimizer(model, config, 3e-4).param_groups
    parameters = dict(model.named_parameters())
    for group, names, decay in zip(groups, decay_groups(model, "matrices"), (0.07, 0.0), strict=True):
        assert [id(p) for p in group["params"]] == [id(parameters[name]) for name in names]
        assert (group["lr"], group["weight_decay"]) == (3e-4, decay)


# --- engines


DECAYED = ("optim.layer_decay=0.5", "train.clip_grad_norm=null", "model.drop_path_rate=0")
NEXT = {"ddp": "fsdp", "fsdp": "zero1", "zero0": "ddp", "zero1": "zero3", "zero2": "zero0", "zero3": "zero2"}


@pytest.mark.parametrize("name", [*NEXT, "offload"])
def test_state_goes_to_another_engine_and_another_decay(name: str, recipe: Path, tmp_path: Path) -> None:
    """The layout of a checkpoint knows nothing of the groups."""
    engine = engine_alone(recipe, *ENGINES[name], *DECAYED)
    for _ in range(2):
        train_on_ones(engine)
    engine.save(tmp_path)
    expected = [train_on_ones(engine) for _ in range(3)]
    for other, decay in ((name, 0.5), (NEXT.get(name, "ddp"), 0.5), (name, 1.0)):
        loaded = engine_alone(recipe, *ENGINES[other], *DECAYED, f"optim.layer_decay={decay}", "seed=1")
        loaded.load(tmp_path)
        losses = [train_on_ones(loaded) for _ in range(3)]
        if decay == 1.0:
            # The state is the same one, what is made of it is not.
            assert losses[0] == expected[0] and losses[1] != pytest.approx(expected[1], rel=1e-3)
        elif other == name:
            assert losses == expected
        else:
            assert losses == pytest.approx(expected, rel=1e-5)


# --- what a user sees of it


def test_a_run_keeps_its_decay_and_an_older_one_has_none(recipe: Path, tmp_path: Path) -> None:
    run = resolve(load_config(recipe), 1)
    tree = run.config.model_dump(mode="json")
    assert tree["optim"].pop("layer_decay") == 1.0
    folder = tmp_path / "runs" / "run"
    RunDir.open(folder, tree, {}).close("stopped")
    (folder / "checkpoints" / "step-00000005").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000005" / "commit.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 5}\n')
    check_same_run(folder, run)
    with pytest.raises(UserError, match=r"optim\.layer_decay: 1\.0 there, 0\.7 here"):
        check_same_run(folder, resolve(load_config(recipe, ["optim.layer_decay=0.7"]), 1))


def test_the_summary_has_the_range(recipe: Path) -> None:
    """Three layers: the heads have 1e-3, the patch embedding 0.5^4 of it."""
    told = [
        summary(resolve(load_config(recipe, [f"optim.layer_decay={decay}"]), 1), Nodes(1))["learning rate"]
        for decay in (1, 0.5)
    ]
    assert "0.001; warm-up 4 steps" in told[0] and "layer" not in told[0]
    assert "; that is the heads', times 0.5 for every layer before, at the peak 6.25e-05 for the first;" in told[1]
