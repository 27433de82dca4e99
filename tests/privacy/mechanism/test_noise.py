"""The noise has the law it claims, repeats only when told to, and refuses what would void a guarantee."""

import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedmosaic.privacy.mechanism import noise
from fedmosaic.protos.errors import MechanismError

SOURCES = [noise.SecureNoise(), noise.SeededTestNoise(7)]
# Each check may fail by chance with this probability; the secure source cannot be seeded.
CHANCE = 1e-9


def upper_normal(draws: int) -> float:
    return float(stats.norm.isf(CHANCE / draws))


@pytest.mark.parametrize("source", SOURCES, ids=["secure", "seeded"])
def test_gaussian_law(source: noise.NoiseSource) -> None:
    draws, scale = 200_000, 2.5
    sample = source.gaussian(draws, scale)
    assert sample.dtype == np.float64
    assert sample.shape == (draws,)
    assert stats.kstest(sample / scale, "norm").pvalue > CHANCE
    assert abs(sample.mean()) < upper_normal(1) * scale / math.sqrt(draws)
    assert abs(sample.var() / scale**2 - 1) < upper_normal(1) * math.sqrt(2 / draws)
    # Fourth moment of a Gaussian is 3, with variance 96 / draws of its estimate.
    assert abs(np.mean((sample / scale) ** 4) - 3) < upper_normal(1) * math.sqrt(96 / draws)


def test_secure_draws_are_independent_of_their_neighbours() -> None:
    sample = noise.SecureNoise().gaussian(200_000, 1.0)
    bound = upper_normal(1) / math.sqrt(sample.size)
    for lag in (1, 2, 100_000):
        assert abs(np.mean(sample[:-lag] * sample[lag:])) < 1.5 * bound * math.sqrt(
            sample.size / (sample.size - lag)
        )


def test_secure_words_are_uniform_in_every_bit() -> None:
    words = noise.SecureNoise().words(100_000)
    for bit in range(64):
        ones = int(np.count_nonzero(words >> np.uint64(bit) & np.uint64(1)))
        assert stats.binomtest(ones, words.size).pvalue > CHANCE


def test_secure_noise_never_repeats() -> None:
    source = noise.SecureNoise()
    seen = np.concatenate(
        [source.gaussian(500, 1.0), source.gaussian(500, 1.0), noise.SecureNoise().gaussian(500, 1.0)]
    )
    assert np.unique(seen).size == seen.size


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_secure_noise_differs_after_a_fork() -> None:
    source = noise.SecureNoise()
    source.gaussian(1, 1.0)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - runs in the child
        os.write(write_end, source.gaussian(8, 1.0).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert not np.array_equal(np.frombuffer(os.read(read_end, 64)), source.gaussian(8, 1.0))


def test_seeded_noise_repeats_and_says_so() -> None:
    assert np.array_equal(
        noise.SeededTestNoise(3).gaussian(20, 1.0), noise.SeededTestNoise(3).gaussian(20, 1.0)
    )
    assert not np.array_equal(
        noise.SeededTestNoise(3).gaussian(20, 1.0), noise.SeededTestNoise(4).gaussian(20, 1.0)
    )
    assert noise.SeededTestNoise(3).is_test
    assert not noise.SecureNoise().is_test


@pytest.mark.parametrize("source", SOURCES, ids=["secure", "seeded"])
def test_edges(source: noise.NoiseSource) -> None:
    assert source.gaussian(0, 1.0).shape == (0,)
    assert np.array_equal(source.gaussian(5, 0.0), np.zeros(5))
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(MechanismError, match="standard deviation"):
            source.gaussian(3, bad)
    with pytest.raises(MechanismError, match="-3 random numbers"):
        source.gaussian(-3, 1.0)


class ConstantWords:
    """Words that an adversarial test chooses."""

    def __init__(self, word: int) -> None:
        self.word = word

    def words(self, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        return np.full(size, self.word, dtype=np.uint64)


def test_poisson_includes_exactly_the_words_below_the_rate() -> None:
    assert noise.poisson_sample(4, 0.25, ConstantWords(2**62 - 1)).tolist() == [0, 1, 2, 3]
    assert noise.poisson_sample(4, 0.25, ConstantWords(2**62)).size == 0


@pytest.mark.parametrize("source", SOURCES, ids=["secure", "seeded"])
def test_poisson_sample_sizes_are_binomial(source: noise.BitSource) -> None:
    sizes = [noise.poisson_sample(500, 0.1, source).size for _ in range(400)]
    assert abs(np.mean(sizes) - 50) < upper_normal(1) * math.sqrt(45 / 400)
    # Variance 45 for a Poisson sample, 0 for a batch of fixed size, which would void the accounting.
    assert 45 * 0.5 < np.var(sizes) < 45 * 1.6


@given(size=st.integers(0, 300), rate=st.floats(1e-6, 1.0))
def test_poisson_indices_are_valid_and_ascending(size: int, rate: float) -> None:
    chosen = noise.poisson_sample(size, rate, noise.SeededTestNoise(size))
    assert np.all(np.diff(chosen) > 0)
    assert np.all((chosen >= 0) & (chosen < size))


def test_poisson_edges() -> None:
    source = noise.SecureNoise()
    assert noise.poisson_sample(5, 1.0, source).tolist() == [0, 1, 2, 3, 4]
    assert noise.poisson_sample(0, 0.5, source).size == 0
    assert noise.poisson_sample(100_000, 5e-324, source).size == 0
    for bad in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(MechanismError, match="sampling rate"):
            noise.poisson_sample(5, bad, source)
