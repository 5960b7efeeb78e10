"""What every registered model must do. A new family joins by its reduction in `SMALL`."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.models import (
    ModelInfo,
    create_model,
    list_models,
    model_info,
    num_drop_paths,
    resize_pos_embed,
    set_drop_path_noise,
)
from pipeline.models.drop_path import DropPath
from pipeline.train.optim import decay_groups
from tests.conftest import missing
from tests.models.structures import one_of_each


def small_nest(info: ModelInfo) -> dict[str, Any]:
    """Blocks of 2x2 tokens, one layer per level, 8 channels per head; levels, heads and attention as registered."""
    heads = info.config["num_heads"]
    widths = 8 * heads if isinstance(heads, int) else tuple(8 * h for h in heads)
    img_size = info.config["patch_size"] * 2 ** info.config["num_levels"]
    return {"img_size": img_size, "depths": 1, "embed_dims": widths}


def small_hvt(info: ModelInfo) -> dict[str, Any]:
    """As few layers as the stages allow, 8x8 tokens of 2x2 pixels."""
    heads, stages = info.config["num_heads"] // 3, info.config["stages"]
    return {"img_size": 16, "patch_size": 2, "num_heads": heads, "head_dim": 8, "depth": max(stages, 2)}


def small_refiner(info: ModelInfo) -> dict[str, Any]:
    """A pair of layers, 4x4 tokens, heads as registered."""
    return {"img_size": 32, "patch_size": 8, "embed_dim": 4 * info.config["num_heads"], "depth": 2}


def small_deit(info: ModelInfo) -> dict[str, Any]:
    heads = info.config["num_heads"]
    return {"img_size": 16, "patch_size": 4, "embed_dim": 8 * heads, "depth": 2}


SMALL: dict[str, Callable[[ModelInfo], dict[str, Any]]] = {
    "nest": small_nest,
    "hvt": small_hvt,
    "refiner": small_refiner,
    "deit": small_deit,
}

every_model = pytest.mark.parametrize("name", list_models())


def small(name: str, drop_path_rate: float = 0.4) -> nn.Module:
    torch.manual_seed(0)
    info = model_info(name)
    return create_model(name, **SMALL[info.family](info), num_classes=7, drop_path_rate=drop_path_rate)


def batch(model: nn.Module, size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, model.img_size, model.img_size, generator=generator)
    return images, torch.rand(size, num_drop_paths(model), generator=generator)


def train_step(model: nn.Module, images: Tensor, noise: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one training step."""
    set_drop_path_noise(model, noise)
    model.zero_grad()
    logits = model(images)
    F.cross_entropy(logits.float(), torch.arange(len(images)) % 7).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def assert_same_step(got, wanted, *, tolerance: float) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=tolerance, atol=tolerance * gradient.abs().max().item())


@every_model
def test_forward_and_backward(name):
    model = small(name).eval()
    images, _ = batch(model)
    logits, gradients = train_step(model, images, None)
    assert logits.shape == (3, 7)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() and g.any() for g in gradients.values())
    torch.testing.assert_close(model(images[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)  # samples don't see each other
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)


@every_model
def test_autocast_bfloat16(name):
    model = small(name, drop_path_rate=0.0).train()
    images, noise = batch(model)
    wanted, _ = train_step(model, images, noise)
    with torch.autocast("cpu", torch.bfloat16):
        got, gradients = train_step(model, images, noise)
    assert got.dtype == torch.bfloat16
    # Fresh attention maps are nearly uniform; the released Refiner's BatchNorms enlarge what differs, and with it the
    # rounding to bfloat16's eight bits.
    tolerance = 0.15 if model_info(name).config.get("flavour") == "official" else 0.03
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("name", one_of_each())
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    model = small(name).train()
    images, noise = batch(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    got, wanted = train_step(compiled, images, noise), train_step(model, images, noise)
    got = got[0], {key.removeprefix("_orig_mod."): value for key, value in got[1].items()}
    assert_same_step(got, wanted, tolerance=1e-5)


def test_inductor_agrees():
    if not shutil.which("g++"):
        missing("torch.compile with inductor left out: no C++ compiler (g++) here")
    torch._dynamo.reset()
    torch.manual_seed(0)
    size = {"img_size": 4, "num_levels": 2, "embed_dims": 16, "num_heads": 2, "depths": 1}
    model = create_model("nest_micro", **size, num_classes=7, drop_path_rate=0.4).train()
    images, noise = batch(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    got, wanted = train_step(compiled, images, noise), train_step(model, images, noise)
    got = got[0], {key.removeprefix("_orig_mod."): value for key, value in got[1].items()}
    assert_same_step(got, wanted, tolerance=1e-4)


@every_model
@pytest.mark.parametrize("handed", [True, False])
def test_activation_checkpointing_changes_nothing(name, handed):
    model = small(name).train()
    images, noise = batch(model)
    steps = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        steps.append(train_step(model, images, noise if handed else None))
    assert_same_step(steps[1], steps[0], tolerance=0.0)


@every_model
def test_drop_path_rates_rise_linearly(name):
    with torch.device("meta"):
        model = create_model(name, drop_path_rate=0.3)
    rates = torch.tensor([m.rate for m in model.modules() if isinstance(m, DropPath)], dtype=torch.float64)
    assert torch.equal(rates[::2], rates[1::2])  # both branches of a layer
    torch.testing.assert_close(rates[::2], torch.linspace(0, 0.3, len(rates) // 2, dtype=torch.float64))
    assert rates[0] == 0.0
    own = model_info(name).config["drop_path_rate"]
    with torch.device("meta"):
        assert max(m.rate for m in create_model(name).modules() if isinstance(m, DropPath)) == pytest.approx(own)


# From the official code, written here once more. Refiner-L has the rate of its training with token labels.
PUBLISHED_DROP_PATH = {
    **{"nest_tiny": 0.2, "nest_small": 0.3, "nest_base": 0.5},
    **dict.fromkeys(["nest_tiny_cifar", "nest_small_cifar", "nest_base_cifar"], 0.1),
    "nest_micro": 0.1,  # of no paper: as the small ones
    **{f"refiner_vit_{size}": rate for size, rate in (("s", 0.1), ("m", 0.2), ("l", 0.25))},
    **{f"refiner_vit_{size}_linear": rate for size, rate in (("s", 0.1), ("m", 0.2), ("l", 0.25))},
    **{f"hvt_{size}_{stages}": 0.1 for size in ("ti", "s", "b") for stages in range(5)},
    **dict.fromkeys(["deit_tiny", "deit_small", "deit_base"], 0.1),
}


def test_drop_path_rates_are_the_published_ones():
    assert {name: model_info(name).config["drop_path_rate"] for name in list_models()} == PUBLISHED_DROP_PATH


@every_model
def test_weights_survive_safetensors_and_deepcopy(name):
    model = small(name).eval()
    images, _ = batch(model)
    with torch.no_grad():
        expected = model(images)
        twin = copy.deepcopy(model)
        stored = load(save(model.state_dict()))
        assert all(torch.equal(stored[key], value) for key, value in model.state_dict().items())
        for param in model.parameters():
            param.zero_()
        assert torch.equal(twin(images), expected)
        model.load_state_dict(stored)
        assert torch.equal(model(images), expected)


@every_model
def test_decayed_parameters_are_the_official_ones(name):
    """NesT decays all but its position embeddings; the others, as timm, matrices but neither positions nor tokens."""
    with torch.device("meta"):
        model = create_model(name)
    nest = model_info(name).family == "nest"
    decayed, exempt = decay_groups(model, "all" if nest else "matrices")
    embeddings = [n for n, _ in model.named_parameters() if n.endswith(("pos_embed", "cls_token"))]
    if nest:
        assert exempt == embeddings == [f"levels.{i}.pos_embed" for i in range(len(model.levels))]
    else:
        assert exempt == [n for n, p in model.named_parameters() if p.ndim == 1 or n in embeddings]
        pools = len(getattr(model, "pooled_layers", ()))
        assert len(embeddings) == pools + 1 + (model_info(name).family != "hvt")
    assert len(decayed) + len(exempt) == len(list(model.parameters()))
    if name == "nest_tiny":
        assert sum(model.get_parameter(n).numel() for n in decayed) == 16_530_760


@every_model
def test_weights_work_at_another_resolution(name):
    """Twice the side: position embeddings are interpolated on their own grid, everything else stays as it is."""
    model = small(name).eval()
    options = SMALL[model_info(name).family](model_info(name))
    larger = create_model(name, **(options | {"img_size": 2 * model.img_size}), num_classes=7).eval()
    state = model.state_dict()
    assert all(value is state[key] for key, value in resize_pos_embed(state, model).items())
    resized = resize_pos_embed(state, larger)
    larger.load_state_dict(resized)
    assert resized.keys() == state.keys()
    for key, value in state.items():
        if not key.endswith("pos_embed"):
            assert torch.equal(resized[key], value)
        else:
            torch.testing.assert_close(resized[key], twice_as_large(value, key, larger), rtol=1e-5, atol=1e-7)
    images = torch.randn(2, 3, model.img_size, model.img_size, generator=torch.Generator().manual_seed(1))
    double = F.interpolate(images, scale_factor=2)
    with torch.no_grad():
        assert larger(double).isfinite().all() and larger(double).shape == (2, 7)
        assert not torch.allclose(larger(double), model(images))


def twice_as_large(old: Tensor, key: str, larger: nn.Module) -> Tensor:
    """Position embeddings by torch's bicubic interpolation: (1, ..., N, C) -> (1, ..., 4 N, C)."""
    extra = 1 if any(name.endswith("cls_token") for name, _ in larger.named_parameters()) else 0
    if key.startswith("pools"):  # a sequence: NumPy spreads it over the raster order and takes it from there again
        step = 2 ** (1 + larger.pooled_layers.index(int(key.split(".")[1])))
        side = larger.img_size // larger.patch_size
        channels = old[0].T.double().numpy()
        middles = step * np.arange(1, channels.shape[1] + 1) - 1  # windows of 3 tokens, 2 apart, of windows, ...
        raster = np.stack([np.interp(np.arange((side // 2) ** 2), middles, channel) for channel in channels])
        raster = double_side(torch.from_numpy(raster.T[None])).numpy()[0].T
        middles = step * np.arange(1, larger.get_parameter(key).shape[1] + 1) - 1
        return torch.from_numpy(np.stack([np.interp(middles, np.arange(side**2), c) for c in raster]).T[None]).float()
    if old.ndim == 4:  # (1, T, n, C): every block by itself
        return double_side(old[0])[None]
    return torch.cat([old[:, :extra], double_side(old[:, extra:])], dim=1)


def double_side(grids: Tensor) -> Tensor:
    """(B, s * s, C) -> (B, 2 s * 2 s, C)."""
    s = round(grids.shape[1] ** 0.5)
    planes = grids.unflatten(1, (s, s)).permute(0, 3, 1, 2)
    return F.interpolate(planes, scale_factor=2, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
