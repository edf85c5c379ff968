"""Philox4x32-10 against the published vectors, an independent scalar version and numpy's; and its two maps."""

import numpy as np
import pytest
import torch

from uvg_engine.reference import philox

# Random123's kat_vectors, philox4x32 10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def scalar_philox(counter, key):
    """The paper's round on Python integers: no lanes, no split multiplication."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k, q % 2**32, (p >> 32) ^ d ^ m, p % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_known_answers(counter, key, expected):
    assert scalar_philox(counter, key) == expected
    words = philox.philox4x32(*(torch.tensor([v]) for v in (*counter, *key)))
    assert tuple(int(w) for w in words) == expected


def test_equals_scalar_on_random_inputs():
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 2**32, size=(6, 200))
    got = torch.stack(philox.philox4x32(*torch.from_numpy(inputs))).T.tolist()
    assert got == [list(scalar_philox(row[:4], row[4:])) for row in inputs.T.tolist()]


def test_words_of_a_seed_broadcast_and_wrap():
    seed = -(2**62) + 12345
    low, high = seed % 2**32, (seed % 2**64) >> 32
    got = philox.words(torch.tensor(seed), 7, philox.COIN, torch.arange(3), 9)
    for token in range(3):
        assert tuple(int(w[token]) for w in got) == scalar_philox((7, 2, token, 9), (low, high))
    with pytest.raises(ValueError, match="seeds must be an int64 tensor"):
        philox.words(torch.tensor(1.0), 0, 0, 0)


def test_same_round_constants_as_numpy():
    """numpy has philox4x64 only: the same rounds on wider words must give its output."""
    a, b, c, d, k, m = 1, 2, 3, 4, 5, 6
    expected = np.random.Philox(counter=[0, 2, 3, 4], key=[k, m]).random_raw(4)  # it steps the counter before use
    for _ in range(10):
        p, q = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (q >> 64) ^ b ^ k, q % 2**64, (p >> 64) ^ d ^ m, p % 2**64
        k, m = (k + 0x9E3779B97F4A7C15) % 2**64, (m + 0xBB67AE8584CAA73B) % 2**64
    assert (a, b, c, d) == tuple(int(v) for v in expected)


def test_uniform_is_exact_and_open():
    word = torch.tensor([0, 511, 512, 2**31, 2**32 - 1])
    u32, u64 = philox.uniform(word), philox.uniform(word, torch.float64)
    assert torch.equal(u32.double(), u64)
    assert u64.tolist() == [2.0**-24, 2.0**-24, 3 * 2.0**-24, 0.5 + 2.0**-24, 1 - 2.0**-24]
    with pytest.raises(ValueError, match="dtype must be"):
        philox.uniform(word, torch.bfloat16)


def test_integers_cover_the_range():
    assert philox.integers(torch.tensor([0, 2**31, 2**32 - 1]), 256384).tolist() == [0, 128192, 256383]
    assert philox.integers(torch.tensor([2**32 - 1]), 2**31 - 1).tolist() == [2**31 - 2]
    counts = torch.bincount(philox.integers(philox.words(torch.tensor(3), 0, 1, torch.arange(7000))[1], 7), minlength=7)
    assert ((counts - 1000) ** 2 / 1000).sum() < 22.5  # chi-square, 6 degrees, 0.1 %
    with pytest.raises(ValueError, match="high must be"):
        philox.integers(torch.tensor([1]), 0)


def test_normals_are_normal_and_lanes_independent():
    n = philox.normals(*philox.words(torch.tensor(11), 0, philox.NOISE, torch.arange(50_000)), dtype=torch.float64)
    assert n.shape == (50_000, 4) and bool(n.isfinite().all())
    assert n.mean(0).abs().max() < 0.02 and (n.var(0) - 1).abs().max() < 0.03
    assert (n.T @ n / len(n) - torch.eye(4)).abs().max() < 0.03
    below = (n[..., None] < torch.tensor([-1.0, 0.0, 1.0, 2.0])).double().mean((0, 1))
    assert (below - torch.tensor([0.158655, 0.5, 0.841345, 0.97725], dtype=torch.float64)).abs().max() < 0.005
    extreme = philox.normals(*(torch.tensor([w]) for w in (0, 0, 2**32 - 1, 2**32 - 1)))
    assert bool(extreme.isfinite().all()) and extreme.abs().max() < 5.78
