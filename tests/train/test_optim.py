"""Weight-decay groups, and that a bad gradient leaves weights and moments alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.config import OptimConfig
from pipeline.models import create_model
from pipeline.train.optim import decay_groups, make_optimizer


def count(model: nn.Module, names: list[str]) -> int:
    parameters = dict(model.named_parameters())
    return sum(parameters[name].numel() for name in names)


def test_nest_decays_everything_but_position_embeddings() -> None:
    with torch.device("meta"):
        model = create_model("nest_tiny")
    with_decay, without = decay_groups(model, "all")
    assert count(model, with_decay) == 16_530_760
    assert count(model, without) == 526_848
    assert all(name.endswith("pos_embed") for name in without)


def test_matrices_leaves_out_one_dimensional_parameters() -> None:
    with torch.device("meta"):
        model = create_model("nest_micro")
    with_decay, without = decay_groups(model, "matrices")
    parameters = dict(model.named_parameters())
    assert with_decay and all(parameters[name].ndim > 1 for name in with_decay)
    assert {name for name in parameters if parameters[name].ndim == 1} <= set(without)
    assert sorted(with_decay + without) == sorted(parameters)


def test_groups_carry_their_decay() -> None:
    optimizer = make_optimizer(create_model("nest_micro"), OptimConfig(lr=1e-3, weight_decay=0.07), 1e-3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.07, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_flagged_step_changes_nothing(value: float) -> None:
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimConfig(lr=0.1), 0.1)
    for flag in (0.0, 1.0, 0.0):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        moments = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value if flag else 0.5)
        optimizer.found_inf = torch.tensor(flag)  # type: ignore[attr-defined]
        optimizer.step()
        same = all(torch.equal(before[name], p) for name, p in model.named_parameters())
        assert same == bool(flag)
        if flag:
            for p, state in moments.items():
                assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())
