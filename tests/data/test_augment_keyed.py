"""Keyed random numbers: pure, independent of each other, of the right distribution, and the same for ever."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.data.augment.keyed import Stream, chunk_key, generator, normals, sample_key, uniforms
from pipeline.data.fast import noise

# Golden values: they may not change between platforms, NumPy versions or releases of this project, because then an
# old run could not be resumed.
GOLDEN_KEYS = [
    ((0, 0, 0), 13318317027962493048),
    ((42, 3, 1_281_166), 10369136810650538101),
    ((2**63 + 5, 299, 7), 5319659674553895612),
]


@pytest.mark.parametrize(("arguments", "key"), GOLDEN_KEYS)
def test_sample_key_never_changes(arguments: tuple[int, int, int], key: int) -> None:
    assert sample_key(*arguments) == key


def test_numbers_never_change() -> None:
    assert uniforms(1, Stream.CROP, 2).tolist() == [0.31971719921705266, 0.37432949347523004]
    np.testing.assert_allclose(normals(1, Stream.ERASING_NOISE, 3), [-0.0707235, 0.19986395, 0.8930885], rtol=1e-5)
    np.testing.assert_allclose(generator(1, Stream.MIX_WEIGHT).beta(0.8, 0.8, 2), [0.75273882, 0.71691019], rtol=1e-8)


def test_every_argument_changes_the_key() -> None:
    grid = list(itertools.product(range(3), range(4), range(500)))
    keys = {sample_key(*arguments) for arguments in grid} | {chunk_key(*arguments) for arguments in grid}
    assert len(keys) == 2 * len(grid)


def test_streams_differ_and_do_not_depend_on_how_many_numbers_are_asked() -> None:
    key = sample_key(0, 0, 5)
    firsts = {uniforms(key, stream, 1)[0] for stream in Stream}
    assert len(firsts) == len(Stream)
    np.testing.assert_array_equal(uniforms(key, Stream.CROP, 100)[:7], uniforms(key, Stream.CROP, 7))
    np.testing.assert_array_equal(normals(key, Stream.CROP, 100)[:7], normals(key, Stream.CROP, 7))


def test_uniform_over_samples_epochs_and_draws() -> None:
    """Chi-square over 64 bins, 63 degrees of freedom: 99.9 % of the values lie below 103.4."""
    over_index = [uniforms(sample_key(0, 0, i), Stream.FLIP, 1)[0] for i in range(4096)]
    over_epoch = [uniforms(sample_key(0, e, 0), Stream.FLIP, 1)[0] for e in range(4096)]
    over_draw = uniforms(sample_key(0, 0, 0), Stream.FLIP, 4096)
    for values in (over_index, over_epoch, over_draw):
        counts, _ = np.histogram(values, bins=64, range=(0, 1))
        assert ((counts - 64) ** 2 / 64).sum() < 103.4
    # Neighbouring samples have nothing in common: the correlation of n pairs has a standard deviation of 1/sqrt(n).
    assert abs(np.corrcoef(over_index[:-1], over_index[1:])[0, 1]) < 4 / np.sqrt(4096)
    assert abs(np.corrcoef(over_index, over_epoch)[0, 1]) < 4 / np.sqrt(4096)


@pytest.mark.parametrize("n", [1, 2, 7, 50_000])
def test_compiled_normals_are_the_same(n: int) -> None:
    for key in (0, sample_key(1, 2, 3), 2**64 - 1):
        for stream in (Stream.ERASING_NOISE, Stream.CROP):
            assert np.array_equal(noise.normals(key, stream, n), normals(key, stream, n))


def test_normals_are_standard_normal() -> None:
    values = normals(sample_key(0, 0, 0), Stream.ERASING_NOISE, 200_001).astype(np.float64)
    assert values.shape == (200_001,) and np.isfinite(values).all()
    n = len(values)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((values**power).mean() - moment) < 4 * np.sqrt(variance / n)
    # The two numbers of one hash are uncorrelated, and so are their squares.
    pairs = values[:-1].reshape(-1, 2).T
    assert abs(np.corrcoef(*pairs)[0, 1]) < 4 / np.sqrt(n / 2)
    assert abs(np.corrcoef(*pairs**2)[0, 1]) < 4 / np.sqrt(n / 2)
