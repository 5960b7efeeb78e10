"""Position embeddings of another image size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from pipeline.models import ModelError, create_model, resize_pos_embed
from pipeline.models.blocks import blockify


def test_same_block_grid_follows_the_official_zoom():
    """The official fine-tuning zooms every block by itself with scipy, order 1."""
    torch.manual_seed(0)
    small, large = create_model("nest_micro"), create_model("nest_micro", img_size=28)
    resized = resize_pos_embed(small.state_dict(), large, mode="bilinear")
    for i, level in enumerate(small.levels):
        blocks = level.pos_embed.detach().double().reshape(-1, 4, 4, level.pos_embed.shape[-1]).numpy()
        expected = np.stack([ndimage.zoom(block, (7 / 4, 7 / 4, 1), order=1) for block in blocks])
        got = resized[f"levels.{i}.pos_embed"]
        np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_same_block_grid_keeps_blocks_apart(mode):
    small, large = create_model("nest_micro"), create_model("nest_micro", img_size=32)
    state = small.state_dict()
    constants = torch.randn(1, 16, 1, 32)
    state["levels.0.pos_embed"] = constants.expand(1, 16, 16, 32).clone()
    got = resize_pos_embed(state, large, mode=mode)["levels.0.pos_embed"]
    torch.testing.assert_close(got, constants.expand(1, 16, 64, 32), rtol=1e-6, atol=1e-6)


def test_another_block_grid_goes_through_the_image_plane():
    """A ramp over the image stays that ramp when three levels of 4x4 tokens become two of 14x14."""
    old = create_model("nest_micro", embed_dims=8, num_heads=1)
    new = create_model("nest_micro", embed_dims=8, num_heads=1, img_size=28, num_levels=2)
    state = old.state_dict()

    def ramp(side: int) -> torch.Tensor:
        line = torch.linspace(0, 1, side)
        plane = line.view(-1, 1) + 10 * line
        return plane.view(1, side, side, 1).expand(1, side, side, 8)

    state["levels.0.pos_embed"] = blockify(ramp(16), 4)
    got = resize_pos_embed(state, new, mode="bilinear")["levels.0.pos_embed"]
    assert got.shape == (1, 4, 196, 8)
    torch.testing.assert_close(got, blockify(ramp(28), 14), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "size"), [("nest_micro", 24), ("nest_tiny_cifar", 48), ("nest_tiny", 32)])
def test_resized_weights_load_and_equal_sizes_pass_through(name, size):
    small = {"embed_dims": 24, "num_heads": 2, "depths": 1}
    old = create_model(name, **small, img_size=2 * size)
    state = old.state_dict()
    same = resize_pos_embed(state, old)
    assert all(same[key] is state[key] for key in state)
    new = create_model(name, **small, img_size=size).eval()
    new.load_state_dict(resize_pos_embed(state, new))
    assert new(torch.randn(1, 3, size, size)).isfinite().all()
    assert all(torch.equal(value, state[key]) for key, value in new.state_dict().items() if "pos_embed" not in key)


def test_another_width_is_refused():
    state = create_model("nest_micro").state_dict()
    with pytest.raises(ModelError, match=r"levels\.0\.pos_embed of shape \(1, 16, 16, 32\) can't be resized"):
        resize_pos_embed(state, create_model("nest_micro", embed_dims=24, num_heads=2))
    with pytest.raises(ModelError, match="mode='nearest' is not one of 'bicubic', 'bilinear'"):
        resize_pos_embed(state, create_model("nest_micro"), mode="nearest")
