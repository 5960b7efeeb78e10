"""Grouped BatchNorm: torch's on each group, running averages of a step whatever it was cut into."""

from __future__ import annotations

import pytest
import torch

from pipeline.models import ModelError
from pipeline.models.batch_norm import BatchNorm2d, group_statistics, update_groups

GO, SKIP = torch.zeros(()), torch.ones(())


def norm(group: int | None = None) -> BatchNorm2d:
    torch.manual_seed(0)
    module = BatchNorm2d(3)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    if group:
        assert group_statistics(torch.nn.Sequential(module), group) == [module]
    return module


def pictures() -> torch.Tensor:
    return 3 + 2 * torch.randn(12, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def test_without_groups_it_is_torchs():
    ours, theirs = norm(), torch.nn.BatchNorm2d(3)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(pictures()), theirs(pictures()))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_each_group_has_its_own_statistics_and_gradients():
    x, y = pictures().requires_grad_(), pictures().requires_grad_()
    ours, theirs = norm(4), norm()
    out = ours(x)
    wanted = torch.cat([theirs(part) for part in y.split(4)])
    torch.testing.assert_close(out, wanted)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert torch.equal(ours.running_mean, torch.zeros(3))  # only a step moves it
    update_groups([ours], GO, None)
    groups = pictures().split(4)
    mean = torch.stack([g.mean((0, 2, 3)) for g in groups]).mean(0)
    variance = torch.stack([g.var((0, 2, 3)) for g in groups]).mean(0)
    torch.testing.assert_close(ours.running_mean, 0.1 * mean)
    torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * variance)
    assert ours.num_batches_tracked == 1
    ours.eval()
    torch.testing.assert_close(
        ours(x), torch.nn.functional.batch_norm(x, ours.running_mean, ours.running_var, ours.weight, ours.bias)
    )


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("recomputed", [1, 2])
def test_running_averages_do_not_depend_on_micro_batches_processes_or_recomputation(parts, recomputed):
    whole = norm(4)
    whole(pictures())
    update_groups([whole], GO, None)
    cut = norm(4)
    for part in pictures().chunk(parts):
        for _ in range(recomputed):
            cut(part)
    # What the sum over three equal processes does to a tensor.
    update_groups([cut], GO, lambda t: t.mul_(3))
    torch.testing.assert_close(cut.running_mean, whole.running_mean)
    torch.testing.assert_close(cut.running_var, whole.running_var)


def test_a_skipped_step_moves_nothing():
    module = norm(4)
    module(torch.full((4, 3, 5, 5), torch.nan))
    update_groups([module], SKIP, None)
    assert torch.equal(module.running_mean, torch.zeros(3)) and torch.equal(module.running_var, torch.ones(3))
    assert module.num_batches_tracked == 0 and not module.groups_seen
    module(pictures())
    update_groups([module], GO, None)
    assert module.running_mean.isfinite().all() and module.running_mean.any()


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ModelError, match="12 samples can't be cut into groups of 5"):
        norm(5)(pictures())
