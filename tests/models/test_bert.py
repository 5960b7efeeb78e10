"""Refiner's attention in BERT: equal to the plain one where it must be, and blind to padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.batch_norm import BatchNorm2d, group_statistics
from pipeline.models.bert import Bert, bert_config, check_pretrained, load_pretrained, refined_attention
from pipeline.models.bert_options import BertOptions
from pipeline.models.refine_maps import LinearRefiner, OfficialRefiner

SMALL = {"layers": 2, "dim": 32, "heads": 4, "vocab_size": 50, "positions": 24, "dropout": 0.0, "attn_dropout": 0.0}
REFINERS: list[dict[str, Any]] = [
    {"flavour": "linear", "expansion": 3, "kernel": 3},
    {"flavour": "linear", "expansion": 2, "kernel": 5, "blocks": [1]},
    {"flavour": "linear", "expansion": 2, "kernel": 3, "reduction": False},
    {"flavour": "official", "expansion": 3, "kernel": 3},
]


def bert(refine: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Bert:
    torch.manual_seed(seed)
    return Bert(BertOptions.of("bert_tiny", {**SMALL, "refine": refine, "refine_start": "random", **options}))


def sentences(lengths: list[int], longest: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens drawn sample by sample, so that they don't depend on the padding, which is filled with 0."""
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    for i, length in enumerate(lengths):
        ids[i, :length] = torch.randint(1, 50, (length,), generator=torch.Generator().manual_seed(seed + i))
    return ids, torch.where(real, ids % 2, 0), real


def hidden(model: Bert, ids: Tensor, types: Tensor, real: Tensor) -> Tensor:
    """(B, N, C) after the last layer."""
    return model.bert(input_ids=ids, token_type_ids=types, attention_mask=real).last_hidden_state


def roughen(model: nn.Module, seed: int = 1) -> None:
    """Give every BatchNorm scales, shifts and averages that are not those of the start."""
    generator = torch.Generator().manual_seed(seed)
    for norm in (m for m in model.modules() if isinstance(m, BatchNorm2d)):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            assert tensor is not None
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


@pytest.mark.parametrize("flavour", ["linear", "official"])
def test_identity_weights_give_the_plain_bert(flavour: str) -> None:
    plain, refined = bert().eval(), bert({"flavour": flavour, "expansion": 1, "kernel": 1}).eval()
    nn.init.normal_(plain.classifier.weight)
    refined.load_state_dict(plain.state_dict(), strict=False)
    for module in refined.modules():
        if isinstance(module, LinearRefiner | OfficialRefiner):
            for conv in (module.expand, module.reduce):
                nn.init.eye_(conv.weight.data[:, :, 0, 0])  # type: ignore[union-attr,index]
            nn.init.ones_(module.local.weight)
        if isinstance(module, OfficialRefiner):
            # What goes through ReLU6 is switched off; the shortcut stays, through one BatchNorm.
            nn.init.zeros_(module.bn3.weight)
            nn.init.constant_(module.adapt_bn.weight, (1 + module.adapt_bn.eps) ** 0.5)
    batch = sentences([9, 4, 12], 12)
    wanted = plain(*batch)
    assert wanted.std() > 0.1
    torch.testing.assert_close(refined(*batch), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(hidden(refined, *batch)[batch[2]], hidden(plain, *batch)[batch[2]], rtol=0, atol=1e-6)


def test_the_plain_one_is_the_librarys() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    plain = bert().eval()
    theirs = BertForSequenceClassification(BertConfig(**bert_config(plain.options).to_diff_dict())).eval()
    theirs.set_attn_implementation("eager")
    theirs.load_state_dict(plain.state_dict())
    ids, types, real = sentences([9, 4, 12], 12)
    wanted = theirs(input_ids=ids, token_type_ids=types, attention_mask=real).logits
    torch.testing.assert_close(plain(ids, types, real), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("refine", REFINERS)
@pytest.mark.parametrize("training", [False, True])
def test_padding_never_changes_real_tokens(refine: dict[str, Any], training: bool) -> None:
    """Whatever stands in the padding and however long it is, also in the statistics that training takes."""
    for seed in range(4):
        lengths = torch.randint(2, 12, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
        outputs, norms, gradients = [], [], []
        for longest, fill in ((max(lengths), 0), (max(lengths), 49), (24, 0), (19, 7)):
            model = bert(refine, seed=5).train(training)
            roughen(model)
            group_statistics(model, 2)
            ids, types, real = sentences(lengths, longest, seed=10 * seed)
            ids, types = torch.where(real, ids, fill), torch.where(real, types, fill % 2)
            states = hidden(model, ids, types, real)
            states[real].square().sum().backward()
            outputs.append(states[real])
            norms.append([m.pending for m in model.modules() if isinstance(m, BatchNorm2d)])
            gradients.append([p.grad for n, p in model.named_parameters() if "encoder" in n])
        for other in range(1, 4):
            torch.testing.assert_close(outputs[other], outputs[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(norms[other], norms[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradients[other], gradients[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("refine", REFINERS)
def test_refined_maps_are_0_in_the_padding_and_nowhere_else(refine: dict[str, Any]) -> None:
    module = bert(refine).bert.encoder.layer[1].attention.self
    roughen(module)
    query, key, value = torch.randn(3, 2, 4, 10, 8)
    mask = (torch.arange(10) < torch.tensor([[6], [10]]))[:, None, None, :]
    _, maps = refined_attention(module, query, key, value, mask)
    assert maps is not None
    real = (mask & mask.transpose(-2, -1)).expand_as(maps)
    assert (maps[~real] == 0).all() and (maps[real] != 0).all()


@pytest.mark.parametrize("refine", [REFINERS[0], REFINERS[3]])
def test_neighbours_mix_so_that_the_test_above_means_something(refine: dict[str, Any]) -> None:
    """A real token in the place of the first padding does change the others."""
    model = bert(refine).eval()
    roughen(model)
    ids, types, real = sentences([5], 8)
    more = real.clone()
    more[0, 5] = True
    assert (hidden(model, ids, types, more)[0, :5] - hidden(model, ids, types, real)[0, :5]).abs().max() > 1e-3


def test_statistics_over_real_places_are_those_of_the_unpadded_maps() -> None:
    torch.manual_seed(0)
    padded, plain = (BatchNorm2d(3) for _ in range(2))
    maps = torch.randn(4, 3, 5, 5)
    wide = torch.full((4, 3, 8, 8), 100.0)
    wide[:, :, :5, :5] = maps
    real = torch.zeros(4, 1, 8, 8)
    real[:, :, :5, :5] = 1
    for norm in (padded, plain):
        group_statistics(norm, 2)
    torch.testing.assert_close(padded(wide, real)[:, :, :5, :5], plain(maps))
    for norm in (padded, plain):
        norm.update_running(torch.zeros(()))
    torch.testing.assert_close(padded.running_mean, plain.running_mean)
    torch.testing.assert_close(padded.running_var, plain.running_var)
    ungrouped, torchs = BatchNorm2d(3), nn.BatchNorm2d(3)
    torch.testing.assert_close(ungrouped(maps, torch.ones(4, 1, 5, 5)), torchs(maps))
    torch.testing.assert_close(ungrouped.running_var, torchs.running_var)


@pytest.mark.parametrize(
    ("name", "refine", "params"),
    [
        ("bert_base", None, 109_483_778),
        ("bert_base", {"expansion": 3, "kernel": 3}, 109_483_778 + 12 * (2 * 12 * 36 + 9 * 36)),
        ("bert_base", {"expansion": 3, "blocks": [0, 1]}, 109_483_778 + 2 * (2 * 12 * 36 + 9 * 36)),
        ("bert_small", None, 28_764_674),
        ("bert_small", {"expansion": 6, "kernel": 3}, 28_764_674 + 4 * (2 * 8 * 48 + 9 * 48)),
        (
            "bert_small",
            {"flavour": "official", "expansion": 3},
            28_764_674 + 4 * (2 * 8 * 24 + 9 * 24 + 4 * 24 + 4 * 8),
        ),
    ],
)
def test_parameters(name: str, refine: dict[str, Any] | None, params: int) -> None:
    with torch.device("meta"):
        model = Bert(BertOptions.of(name, {"refine": refine}))
    assert sum(p.numel() for p in model.parameters()) == params


def test_recomputed_layers_train_alike() -> None:
    gradients = []
    for recomputed in (False, True):
        model = bert(REFINERS[3]).train()
        model.set_grad_checkpointing(recomputed)
        group_statistics(model, 2)
        model(*sentences([9, 4, 7, 12], 12)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_half_precision_stays_close() -> None:
    model = bert(REFINERS[0]).eval()
    batch = sentences([9, 4, 12], 12)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*batch)
    torch.testing.assert_close(half.float(), model(*batch), rtol=0, atol=0.02)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What the library saves of a pretrained encoder, and the encoder."""
    from transformers import BertForPreTraining

    torch.manual_seed(3)
    model = BertForPreTraining(bert_config(bert().options)).eval()
    folder = tmp_path_factory.mktemp("pretrained")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("refine", [None, {"expansion": 3, "kernel": 3}])
def test_pretrained_weights_go_on_as_they_were(refine: dict[str, Any] | None, pretrained: tuple[Path, Any]) -> None:
    folder, theirs = pretrained
    model = bert(refine, refine_start="identity").eval()
    before = model.classifier.weight.clone()
    check_pretrained(str(folder), model.options)
    load_pretrained(model, str(folder), new_head=True)
    ids, types, real = sentences([9, 4, 12], 12)
    wanted = theirs.bert(input_ids=ids, token_type_ids=types, attention_mask=real).last_hidden_state
    torch.testing.assert_close(hidden(model, ids, types, real)[real], wanted[real], rtol=0, atol=1e-5)
    assert torch.equal(model.classifier.weight, before)


def test_what_does_not_fit_is_told(pretrained: tuple[Path, Any], tmp_path: Path) -> None:
    folder = str(pretrained[0])
    with pytest.raises(UserError, match="hidden_size=32, the model dim=64"):
        check_pretrained(folder, bert(dim=64).options)
    with pytest.raises(UserError, match=r"classifier\..*init_head=new"):
        load_pretrained(bert(), folder, new_head=False)
    with pytest.raises(UserError, match=r"model.init=.*no BERT there"):
        check_pretrained(str(tmp_path), bert().options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"refine": {"sharing": True}}, "every layer of BERT has queries"),
        ({"refine": {"flavour": "official", "kernels": "triton"}}, "refine.kernels=triton is for image models"),
        ({"refine": {"kernel": 2}}, "refine.kernel=2 has no middle"),
        ({"refine": {"blocks": [7]}}, "names layer 7; the model has layers 0 to 1"),
        (
            {"refine": {"expansion": 3, "reduction": False}},
            "refine_start=random and 12 expanded maps that divide dim=32",
        ),
        ({"refine": {"expand": 3}}, "did you mean 'expansion'"),
        ({"drop": 0.1}, "did you mean 'dropout'|no option 'drop'"),
        ({"heads": 5}, "5 heads don't divide 32"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        BertOptions.of("bert_tiny", {**SMALL, **options})


def test_an_unknown_size_names_near_ones() -> None:
    with pytest.raises(UserError, match="did you mean bert_small"):
        BertOptions.of("bert_smal", {})
