"""Latents: normal, a function of their keys, and the way between two."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from pipeline.generate.latents import fixed_latents, interpolated, normal


def test_latents_are_normal_and_keyed() -> None:
    values = normal(64, 3, 1, np.arange(2000))
    assert values.shape == (2000, 64) and values.dtype == torch.float32
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 0.01
    correlation = np.corrcoef(values.numpy(), rowvar=False) - np.eye(64)
    assert np.abs(correlation).max() < 0.12
    some = normal(64, 3, 1, np.array([1999, 5]))
    assert torch.equal(some, values[[1999, 5]]), "a row depends on its own number alone"
    assert not torch.equal(normal(64, 4, 1, np.arange(2)), values[:2])
    assert not torch.equal(fixed_latents(64, 3, np.arange(2)), values[:2])


def test_first_values_stay_what_they_are() -> None:
    """Runs of one version must go on with another."""
    values = fixed_latents(3, 0, np.arange(2))
    expected = torch.tensor(FIRST)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


def test_ways_stay_near_the_sphere() -> None:
    ends = fixed_latents(256, 0, np.arange(2))
    way = interpolated(ends[0], ends[1], 9)
    torch.testing.assert_close(way[[0, -1]], ends)
    norms = way.norm(dim=1)
    assert norms.min() > 0.95 * min(ends.norm(dim=1)) and norms.max() < 1.05 * max(ends.norm(dim=1))
    gaps = (way[1:] - way[:-1]).norm(dim=1)
    assert gaps.max() / gaps.min() < 1.2, "even steps"
    assert torch.equal(interpolated(ends[0], ends[0], 3), ends[[0, 0, 0]])


# Box and Muller of the hashes, computed when this was written.
FIRST = [[-1.9170476, -0.9352232, -0.0223311], [0.1132486, 2.3004780, 3.0992734]]
