"""Stochastic depth with handed noise: the rule, its place in the model, and what compiles."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pipeline.models import ModelError, create_model, num_drop_paths, set_drop_path_noise
from pipeline.models.drop_path import DropPath, drop_path_rates


def micro(**overrides) -> nn.Module:
    torch.manual_seed(0)
    return create_model("nest_micro", **{"drop_path_rate": 0.5, **overrides}).train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_by_sample_and_divides(dtype):
    layer = DropPath(0.25).train()
    set_drop_path_noise(layer, torch.tensor([[0.0], [0.2499], [0.25], [0.99]]))
    x = torch.randn(4, 3, 2, 500, generator=torch.Generator().manual_seed(0), dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert not out[:2].any()
    exact = x[2:].double() / 0.75
    # Rounded once, to the dtype of the input; a scale of 1 / 0.75 in bfloat16 would add 0.2 % to every element.
    bound = 0.51 if dtype is torch.bfloat16 else 1.0
    assert ((out[2:].double() - exact).abs() <= bound * torch.finfo(dtype).eps * exact.abs()).all()
    assert layer.eval()(x) is x


@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float32,) * 2, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("times", [1.0, 0.5])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_the_residual_sum(layout, times, dtypes):
    """In one operation, forward and backward, what the product and the sum give one after the other."""
    generator = torch.Generator().manual_seed(0)
    onto, branch, above = (torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    if layout == "transposed":
        onto, branch = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (onto, branch))
    layer = DropPath(0.25).train()
    set_drop_path_noise(layer, torch.tensor([[0.0], [0.7], [0.24], [0.25]]))
    onto, branch = onto.to(dtypes[0]).requires_grad_(), branch.to(dtypes[1]).requires_grad_()
    out = layer(branch, onto, times)
    exact = [t.detach().double().requires_grad_() for t in (onto, branch)]
    scale = times * torch.tensor([0.0, 1 / 0.75, 0.0, 1 / 0.75], dtype=torch.float64)[:, None, None]
    wanted = exact[0] + exact[1] * scale
    assert out.dtype == dtypes[0]
    got = [out, *torch.autograd.grad(out, (onto, branch), above.to(dtypes[0]))]
    expected = [wanted, *torch.autograd.grad(wanted, exact, above.to(dtypes[0]).double())]
    for a, b, dtype in zip(got, expected, (dtypes[0], *dtypes), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 2 * torch.finfo(dtype).eps * b.abs().max()
    assert torch.equal(got[1], above.to(dtypes[0])) and not got[2][::2].any()
    assert torch.equal(layer.eval()(branch, onto, times), onto + (branch if times == 1.0 else branch * times))


def test_a_half_precision_sum_is_rounded_once():
    layer = DropPath(0.3).train()
    set_drop_path_noise(layer, torch.full((999, 1), 0.9))
    onto, branch = torch.randn(2, 999, 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, exact = layer(branch, onto), onto.float() + branch.float() * (1 / torch.tensor(0.7))
    assert out.dtype == torch.bfloat16 and torch.equal(out, exact.bfloat16())


def test_rates():
    assert drop_path_rates(0.2, 12) == pytest.approx(
        torch.linspace(0, 0.2, 12, dtype=torch.float64).tolist(), abs=1e-15
    )
    assert drop_path_rates(0.3, 12)[0] == 0.0
    assert drop_path_rates(0.3, 12)[-1] == pytest.approx(0.3, abs=1e-15)
    assert drop_path_rates(0.3, 1) == [0.0]


def test_without_noise_the_generator_decides():
    layer = DropPath(0.3).train()
    x = torch.ones(20_000, 2, 3)
    torch.manual_seed(1)
    out = layer(x)
    kept = out[:, 0, 0] != 0
    assert torch.equal(out, kept.view(-1, 1, 1) * x / 0.7)
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.015)
    torch.manual_seed(1)
    assert torch.equal(layer(x), out)


def test_columns_follow_the_forward_order():
    """Column i drops exactly the i-th branch that runs: dropping it alone equals removing that branch by hand."""
    model, images = micro(), torch.randn(3, 3, 16, 16)
    names = [name for name, module in model.named_modules() if isinstance(module, DropPath)]
    order: list[str] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name)) for name in names
    ]
    keep_all = torch.full((3, num_drop_paths(model)), 0.9)
    set_drop_path_noise(model, keep_all)
    unchanged = model(images)
    for hook in hooks:
        hook.remove()
    assert order == names
    assert num_drop_paths(model) == 2 * 6

    for index, name in enumerate(names):
        noise = keep_all.clone()
        noise[:, index] = 0.0
        set_drop_path_noise(model, noise)
        dropped = model(images)
        rate = model.get_submodule(name).rate
        set_drop_path_noise(model, keep_all)
        without = model.get_submodule(name).register_forward_hook(lambda _, inputs, __: inputs[1])
        expected = model(images) if rate else unchanged
        without.remove()
        assert torch.equal(dropped, expected), name


def test_a_sample_meets_the_same_masks_however_the_batch_is_split():
    model, images = micro(), torch.randn(6, 3, 16, 16)
    noise = torch.rand(6, num_drop_paths(model))
    set_drop_path_noise(model, noise)
    whole = model(images)
    parts = []
    for rows in (slice(0, 1), slice(1, 6)):
        set_drop_path_noise(model, noise[rows])
        parts.append(model(images[rows]))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
    set_drop_path_noise(model, noise.flip(0))
    assert not torch.allclose(model(images), whole, atol=1e-3)


def test_noise_survives_deepcopy_and_stays_out_of_the_state():
    model, images = micro(), torch.randn(4, 3, 16, 16)
    names = set(model.state_dict())
    set_drop_path_noise(model, torch.rand(4, num_drop_paths(model)))
    assert set(model.state_dict()) == names
    twin = copy.deepcopy(model)
    expected = model(images)
    set_drop_path_noise(model, torch.rand(4, num_drop_paths(model)))
    assert torch.equal(twin(images), expected)
    assert not torch.equal(model(images), expected)
    set_drop_path_noise(model, None)
    torch.manual_seed(5)
    drawn = model(images)
    assert not torch.equal(model(images), drawn)


def test_evaluation_ignores_noise():
    model, images = micro().eval(), torch.randn(2, 3, 16, 16)
    expected = model(images)
    set_drop_path_noise(model, torch.zeros(2, num_drop_paths(model)))
    assert torch.equal(model(images), expected)


def test_noise_of_another_size_is_refused():
    model = micro()
    with pytest.raises(ModelError, match=r"shape \(4, 3\), the model needs \(batch, 12\)"):
        set_drop_path_noise(model, torch.rand(4, 3))
    set_drop_path_noise(model, torch.rand(1, 12))
    with pytest.raises(ModelError, match="set for 1 samples, the batch has 2"):
        model(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_new_noise_needs_no_recompilation(grad_checkpointing):
    torch._dynamo.reset()
    size = {"img_size": 4, "num_levels": 2, "embed_dims": 16, "num_heads": 2, "depths": 1}
    model, images = micro(**size), torch.randn(4, 3, 4, 4)
    model.set_grad_checkpointing(grad_checkpointing)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    for step in range(3):
        noise = torch.rand(4, num_drop_paths(model), generator=torch.Generator().manual_seed(step))
        set_drop_path_noise(compiled, noise)
        set_drop_path_noise(reference, noise)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            outputs.append(compiled(images))
            outputs[-1].square().sum().backward()
        expected = reference(images)
        expected.square().sum().backward()
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-5, atol=1e-6)
        for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-5)
    assert not torch.equal(outputs[0], outputs[1])
