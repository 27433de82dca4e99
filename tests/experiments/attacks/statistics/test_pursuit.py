"""Taking sums of terms apart: against the dense formula, and by the energy that is left."""

import math

import numpy as np
import pytest

from fedmosaic.experiments.attacks.statistics import pursuit
from fedmosaic.protos.errors import ConfigurationError

SIZE = 40


def terms(count: int, seed: int) -> np.ndarray:
    """Correlated terms with a common part."""
    mixing = np.random.default_rng(99).standard_normal((SIZE, SIZE)) / math.sqrt(SIZE)
    return 0.3 + np.random.default_rng(seed).standard_normal((count, SIZE)) @ mixing


def background(noise: float) -> pursuit.Background:
    return pursuit.fit_background(terms(4000, 0), np.full(SIZE, noise))


def test_scores_are_those_of_the_dense_formula() -> None:
    public, generator = terms(500, 1), np.random.default_rng(2)
    noise = generator.uniform(0.5, 2.0, SIZE)
    found = pursuit.fit_background(public, noise, shrinkage=1e-9)
    left, atoms = generator.standard_normal(SIZE), generator.standard_normal((3, SIZE))
    coefficients = generator.standard_normal((6, 3))
    scores = pursuit.log_likelihoods(
        found.coordinates(left), found.coordinates(atoms), coefficients, found, remaining=7.0
    )
    inverse = np.linalg.inv(7.0 * np.cov(public.T, bias=True) + np.diag(noise**2))
    rest = left - 7.0 * public.mean(axis=0) - coefficients @ atoms
    expected = -0.5 * SIZE * np.log(np.einsum("vd,de,ve->v", rest, inverse, rest))
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_the_number_of_terms_is_read_off_the_energy_that_is_left() -> None:
    known = background(0.01)
    for count in (1, 10, 60):
        found = [
            pursuit.unexplained_terms(known.coordinates(terms(count, 10 + seed).sum(axis=0)), known)
            for seed in range(60)
        ]
        assert np.mean(found) == pytest.approx(count, rel=0.25)
    assert pursuit.unexplained_terms(np.zeros(SIZE), known) == 0.0


@pytest.mark.parametrize(
    ("public", "noise"),
    [
        (terms(1, 0), np.ones(SIZE)),
        (terms(5, 0), np.zeros(SIZE)),
        (np.full((5, SIZE), np.nan), np.ones(SIZE)),
    ],
)
def test_a_background_of_nothing_is_refused(public: np.ndarray, noise: np.ndarray) -> None:
    with pytest.raises(ConfigurationError, match="two finite terms and noise above 0"):
        pursuit.fit_background(public, noise)
