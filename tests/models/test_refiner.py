"""Refiner: its operations against slow definitions, folding, the two flavours, dense outputs, ablations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.models import DenseRequest, ModelError, create_model, fold_refiners
from pipeline.models.facts import count_macs, model_facts
from pipeline.models.refine import Refine, map_uses
from pipeline.models.refine_maps import LinearRefiner, OfficialRefiner

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 4, "depth": 4, "num_classes": 5}


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Weights, and the statistics of BatchNorms, far from their initial values."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            positive = name.endswith("running_var") or ("bn" in name and name.endswith("weight"))
            values = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.copy_(values + 0.5 if positive else values - 0.5)
    return module.double().eval()


def maps(heads: int, tokens: int = 7, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, heads, tokens, tokens, generator=generator, dtype=torch.float64).softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("expansion", [1, 2, 6])
@pytest.mark.parametrize("reduction", [True, False])
def test_linear_refiner_is_the_formula_and_folds_exactly(kernel, expansion, reduction):
    refiner = randomise(LinearRefiner(3, expansion, kernel, reduction))
    a = maps(3).numpy()
    expand = refiner.expand.weight[:, :, 0, 0].numpy()
    local = refiner.local.weight[:, 0].numpy()
    expanded = np.einsum("gh,bhij->bgij", expand, a)
    n, r = a.shape[-1], kernel // 2
    convolved = np.zeros_like(expanded)
    for i in range(n):
        for j in range(n):
            for da in range(-r, r + 1):
                for db in range(-r, r + 1):
                    if 0 <= i + da < n and 0 <= j + db < n:
                        convolved[:, :, i, j] += local[:, da + r, db + r] * expanded[:, :, i + da, j + db]
    wanted = (
        np.einsum("mg,bgij->bmij", refiner.reduce.weight[:, :, 0, 0].numpy(), convolved) if reduction else convolved
    )
    np.testing.assert_allclose(refiner(maps(3)), wanted, rtol=0, atol=1e-13)

    folded = refiner.fold()
    assert [type(m) for m in folded.modules() if m is not folded] == [torch.nn.Conv2d]
    assert folded.conv.weight.shape == (3 if reduction else 3 * expansion, 3, kernel, kernel)
    assert (folded(maps(3)) - refiner(maps(3))).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.176])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_official_refiner_folds_exactly(kernel, scale):
    refiner = randomise(OfficialRefiner(3, 2, kernel, scale))
    folded = refiner.fold()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert (folded(maps(3)) - refiner(maps(3))).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", ["refiner_vit_s", "refiner_vit_s_linear"])
def test_a_folded_model_has_the_same_logits(name):
    model = randomise(create_model(name, **TINY))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    folded = model.fold()
    assert (folded(images) - model(images)).abs().max() < 1e-12
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    for family, options in (("nest_micro", {"depths": 1}), ("hvt_ti_2", {"img_size": 32, "patch_size": 8, "depth": 2})):
        if family == "hvt_ti_2":
            options |= {"stages": 1}
        other = randomise(create_model(family, **options, refine={"expansion": 2}))
        size = other.img_size
        images = torch.randn(2, 3, size, size, dtype=torch.float64)
        assert (fold_refiners(other)(images) - other(images)).abs().max() < 1e-12 * other(images).abs().max()


def test_uses_of_maps():
    """Letters: . fused, s source of maps, r refines its own, h refines those of the layer before."""

    def letters(runs: list[int], **options: Any) -> str:
        uses = map_uses(Refine.of(options), runs)
        return "".join("h" if u.shared else "r" if u.refined else "s" if u.explicit else "." for u in uses)

    assert letters([6]) == "rrrrrr"
    assert letters([6], blocks=[1, 4]) == ".r..r."
    assert letters([6], sharing=True) == "shshsh"
    assert letters([6], sharing=True, blocks=[3, 4]) == "..shh."
    assert letters([1, 5, 0, 2], sharing=True) == "." + "shsh." + "sh"
    assert letters([6], flavour="official", sharing=True) == "shshsh"
    assert letters([1, 5], flavour="official", sharing=True) == "sshshs"
    assert letters([4], flavour="official") == "rrrr"


@torch.no_grad()
def test_maps_accumulate_and_pass_unrefined():
    """What layer 2j hands on is the sum over k of s^k times the softmax maps of layer 2(j - k)."""
    model = randomise(create_model("refiner_vit_s", **TINY))
    handed: list[torch.Tensor] = []
    softmaxes: list[torch.Tensor] = []
    for block in model.blocks:
        if not block.attn.shared:
            block.attn.accumulate = False
    model.encode(model.tokens(torch.ones(1, 3, 32, 32, dtype=torch.float64)), lambda i, m: softmaxes.append(m))
    assert torch.allclose(softmaxes[0].sum(-1), torch.ones(1, dtype=torch.float64))
    for block in model.blocks:
        if not block.attn.shared:
            block.attn.accumulate = True
    model.encode(model.tokens(torch.ones(1, 3, 32, 32, dtype=torch.float64)), lambda i, m: handed.append(m))
    assert handed[1] is handed[0] and handed[3] is handed[2]
    rows = handed[2].sum(-1)
    torch.testing.assert_close(rows, torch.full_like(rows, 1 + 6**-0.5))


def test_dense_output_pastes_tokens_and_undoes_it():
    model = randomise(create_model("refiner_vit_s", **TINY))
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    partner = torch.tensor([3, 2, 1, 0])
    box = torch.tensor([[1, 3, 0, 2]]).expand(4, 4)
    plain = model(images, DenseRequest())
    torch.testing.assert_close(plain.logits, model.head(model.forward_features(images)[:, 0]))
    torch.testing.assert_close(plain.logits + 0.5 * plain.tokens.amax(1), model(images))
    assert plain.tokens.shape == (4, 16, 5) and plain.similarity is None

    seen: list[torch.Tensor] = []
    hook = model.pos_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    mixed = model(images, DenseRequest(partner, box))
    model(images)
    hook.remove()
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1:3, 0:2] = True
    inside = inside.flatten()
    own, pasted = seen[1][:, 1:], seen[0][:, 1:]
    torch.testing.assert_close(pasted[:, ~inside], own[:, ~inside])
    torch.testing.assert_close(pasted[:, inside], own[partner][:, inside])
    assert not torch.allclose(mixed.logits, plain.logits)
    # A box over everything is an exchange of pictures: undone for the tokens, not for the class token.
    whole = model(images, DenseRequest(partner, torch.tensor([[0, 4, 0, 4]]).expand(4, 4)))
    torch.testing.assert_close(whole.tokens, plain.tokens)
    torch.testing.assert_close(whole.logits, plain.logits[partner])


@torch.no_grad()
@pytest.mark.parametrize("name", ["refiner_vit_s", "refiner_vit_s_linear"])
@pytest.mark.parametrize("pairs", [1, 3])
def test_similarity_of_consecutive_maps(name, pairs):
    model = randomise(create_model(name, **TINY))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    all_maps: list[torch.Tensor] = []
    model.encode(model.tokens(images), lambda i, m: all_maps.append(m))
    wanted = sum(F.cosine_similarity(all_maps[i], all_maps[i + 1], dim=1).mean() for i in range(pairs))
    got = model(images, DenseRequest(map_pairs=pairs)).similarity
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    if name == "refiner_vit_s":
        assert F.cosine_similarity(all_maps[0], all_maps[1], dim=1).mean().item() == pytest.approx(1.0)
    with pytest.raises(ModelError, match="4 pairs of attention maps can't be compared in 4 layers"):
        model(images, DenseRequest(map_pairs=4))


COUNTS = [
    ("refiner_vit_s", {}, 25_408_656, 6.82),
    ("refiner_vit_m", {}, 55_450_932, 13.50),
    ("refiner_vit_l", {}, 81_150_192, 19.19),
    ("refiner_vit_s", {"img_size": 384}, 25_408_656 + 221_568 - 75_648, 24.09),
    ("refiner_vit_s", {"img_size": 448}, 25_408_656 + 301_440 - 75_648, 35.83),
    ("refiner_vit_m", {"img_size": 384}, 55_450_932 + (577 - 197) * 420, 48.15),
    ("refiner_vit_l", {"img_size": 448}, 81_150_192 + (785 - 197) * 512, 102.36),
    ("refiner_vit_s", {"aux_head": False}, 25_408_656 - 385_000, None),
    ("refiner_vit_s", {"expansion": 6}, 25_408_656 + 10_656, 7.19),
    ("refiner_vit_s", {"sharing": False}, 25_408_656 - 21_318_432 + 16 * (1_479_552 + 1_356 + 24), None),
]


@pytest.mark.parametrize(("name", "options", "params", "gmacs"), COUNTS)
def test_counts(name, options, params, gmacs):
    facts = model_facts(name, **options)
    assert facts.params == params
    if gmacs is not None:
        assert f"{facts.macs / 1e9:.2f}" == f"{gmacs:.2f}"


def refiner_params(heads: int, expansion: int, kernel: int, reduction: bool) -> int:
    hidden = heads * expansion
    return heads * hidden + kernel**2 * hidden + (heads * hidden if reduction else 0)


@pytest.mark.parametrize(
    "options",
    [
        {"expansion": 1},
        {"expansion": 6},
        {"kernel": 1},
        {"kernel": 5},
        {"reduction": False},
        {"expansion": 2, "blocks": [3]},
        {"blocks": []},
    ],
)
def test_every_switch_of_the_linear_form_counts(options):
    reduction = options.get("reduction", True)
    with torch.device("meta"):
        base = create_model("refiner_vit_s_linear", **TINY, blocks=[])
        model = create_model("refiner_vit_s_linear", **TINY, **options)
    layers = len(options["blocks"]) if "blocks" in options else 4
    each = refiner_params(4, options.get("expansion", 3), options.get("kernel", 3), reduction)
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters())
    assert count == layers * each
    assert count_macs(model) > count_macs(base) or not layers


def test_sharing_drops_queries_and_keys():
    with torch.device("meta"):
        own = create_model("refiner_vit_s_linear", **TINY, blocks=[1, 3])
        shared = create_model("refiner_vit_s_linear", **TINY, sharing=True)
    dropped = 2 * 2 * (24 * 24 + 24)
    assert sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in shared.parameters()) == dropped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 2}, "refine.kernel=2 has no middle"),
        ({"expansion": 0}, "refine.expansion=0 is not a positive integer"),
        ({"flavour": "linera"}, "refine.flavour='linera' is not one of 'official', 'linear'"),
        ({"flavour": "official", "reduction": False}, "refine.reduction=false needs refine.flavour=linear"),
        ({"blocks": [4]}, "refine.blocks names layer 4; the model has layers 0 to 3"),
        ({"sharing": True, "blocks": [0]}, "layer 0 is the first with its sequence length"),
        ({"reduction": False, "expansion": 5}, "24 channels of values must be split into 20 heads"),
        ({"stem": "cnn"}, "stem='cnn' is not one of"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ModelError, match=message):
        create_model("refiner_vit_s_linear", **(TINY | options))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nest_micro", {"refine": {"expanson": 3}}, "refine has no option 'expanson', did you mean 'expansion'"),
        ("hvt_s_1", {"refine": 3}, "refine=3: give a mapping"),
        ("refiner_vit_s", {"pool": {"stage": 2}}, "pool has no option 'stage', did you mean 'stages'"),
    ],
)
def test_typos_in_nested_options(model, options, message):
    with pytest.raises(ModelError, match=message):
        create_model(model, **options)
