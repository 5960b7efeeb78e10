"""The counter-based generator: the same for ever, without structure, and a permutation that is one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.hashing import hash64, permutation, seed64, uniform

MASK = 2**64 - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def splitmix(x: int) -> int:
    """SplitMix64's output function in plain integers, as published."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def plain_hash(*keys: int) -> int:
    state = 0
    for key in keys:
        state = splitmix(((state + GOLDEN_GAMMA) & MASK) ^ splitmix((key + GOLDEN_GAMMA) & MASK))
    return state


def test_the_reference_is_splitmix64() -> None:
    # The first two outputs of the published generator from seed 0.
    assert splitmix(GOLDEN_GAMMA) == 0xE220A8397B1DCDAF
    assert splitmix(2 * GOLDEN_GAMMA & MASK) == 0x6E789E6AA1B965F4


@pytest.mark.parametrize("keys", [(0,), (0, 0), (1, 2, 3), (2**63, 2**64 - 1), (7, -1), (2**31 - 1, 103, 299, 1281166)])
def test_hash_equals_plain_integers(keys: tuple[int, ...]) -> None:
    assert int(hash64(*keys)) == plain_hash(*(key & MASK for key in keys))


def test_arrays_broadcast() -> None:
    rows, columns = np.arange(3)[:, None], np.arange(4)
    grid = hash64(5, rows, columns, 9)
    assert grid.shape == (3, 4) and grid.dtype == np.uint64
    assert grid[2, 3] == hash64(5, 2, 3, 9)


# They may not change between platforms, NumPy versions or releases of this project: an old run could not be resumed.
def test_never_changes() -> None:
    assert int(hash64(0)) == 258863698125685209
    assert hash64(42, np.arange(3)).tolist() == [7160897056291845935, 12268176161702065261, 7468476867291194542]
    assert seed64(1, 2, 3) == 8912439378453983
    assert uniform(1, np.arange(3)).tolist() == [0.9397773742675781, 0.17340362071990967, 0.4737504720687866]
    assert permutation(10, 0, 1).tolist() == [1, 0, 5, 4, 6, 8, 2, 9, 7, 3]


def test_order_and_number_of_keys_matter() -> None:
    tuples = [keys for n in range(1, 5) for keys in itertools.product(range(4), repeat=n)]
    assert len({int(hash64(*keys)) for keys in tuples}) == len(tuples)


def test_seed_fits_every_generator() -> None:
    seeds = [seed64(0, i) for i in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds) and len(set(seeds)) == 1000
    assert max(seeds) > 2**62


def test_every_bit_is_fair_and_every_input_bit_counts() -> None:
    n = 20_000
    for values in (hash64(0, np.arange(n)), hash64(np.arange(n), 0)):
        ones = ((values[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).sum(0)
        assert abs(ones - n / 2).max() < 4.5 * np.sqrt(n / 4)
    before = hash64(3, np.arange(2000))
    for bit in range(0, 63, 7):
        flipped = before ^ hash64(3, np.arange(2000) ^ (1 << bit))
        share = np.bitwise_count(flipped).mean() / 64
        assert abs(share - 0.5) < 4.5 * np.sqrt(0.25 / (64 * 2000))


def test_uniform_is_uniform() -> None:
    values = uniform(7, np.arange(2)[:, None], np.arange(50_000))
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    for row in values:
        counts, _ = np.histogram(row, bins=100, range=(0, 1))
        assert ((counts - 500) ** 2 / 500).sum() < 148.2  # chi-square, 99 degrees of freedom: 99.9 %
    assert abs(np.corrcoef(values)[0, 1]) < 4.5 / np.sqrt(50_000)


@pytest.mark.parametrize("n", [0, 1, 2, 17, 10_000])
def test_permutation_holds_everything_once(n: int) -> None:
    order = permutation(n, 3, 4)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(n))
    if n > 10:
        assert (order != permutation(n, 3, 5)).any() and (order == permutation(n, 3, 4)).all()


def test_every_permutation_is_equally_likely() -> None:
    n = 12_000
    seen = [tuple(permutation(4, 0, epoch).tolist()) for epoch in range(n)]
    counts = np.array([seen.count(order) for order in itertools.permutations(range(4))])
    assert ((counts - n / 24) ** 2 / (n / 24)).sum() < 49.7  # chi-square, 23 degrees of freedom: 99.9 %
