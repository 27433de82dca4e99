"""Relevance against the reference formula, closed forms and simulated noise."""

import math
from random import Random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from fedmosaic.protos.messages import Profile
from fedmosaic.server.round.relevance import (
    Relevance,
    corrected_cosine,
    plain_cosine,
    relevance,
    softmax_weights,
)


def everybody(count: int) -> np.ndarray:
    return np.ones(count, dtype=bool)


def reference_weights(vectors: np.ndarray, temperature: float) -> np.ndarray:
    """The released code's softmax (reference-method §2.5), in plain loops: self gets the logit −1e9."""
    count = len(vectors)
    weights = np.zeros((count, count))
    for i in range(count):
        logits = []
        for j in range(count):
            norms = math.sqrt(sum(x * x for x in vectors[i])) * math.sqrt(sum(x * x for x in vectors[j]))
            cosine = sum(x * y for x, y in zip(vectors[i], vectors[j], strict=True)) / norms
            logits.append(-1e9 if i == j else cosine / temperature)
        largest = max(logits)
        exponentials = [math.exp(logit - largest) for logit in logits]
        weights[i] = [e / sum(exponentials) for e in exponentials]
    return weights


@pytest.mark.parametrize("temperature", [0.0625, 0.5, 4.0])
def test_weights_are_those_of_the_reference_formula(temperature: float) -> None:
    vectors = np.random.default_rng(1).normal(size=(7, 20))
    weights = softmax_weights(plain_cosine(vectors), temperature, everybody(7))
    np.testing.assert_allclose(weights, reference_weights(vectors, temperature), rtol=1e-10, atol=1e-15)


matrices = hnp.arrays(
    np.float64,
    st.tuples(st.integers(2, 7), st.integers(1, 6)),
    elements=st.floats(-1e6, 1e6, allow_nan=False),
)


@given(matrices, st.floats(0.01, 10.0), st.data())
def test_rows_sum_to_one_and_never_weigh_the_recipient_or_the_absent(
    vectors: np.ndarray, temperature: float, data: st.DataObject
) -> None:
    count = len(vectors)
    present = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    variances = np.array(data.draw(st.lists(st.floats(0, 1e6), min_size=count, max_size=count)))
    weights = softmax_weights(corrected_cosine(vectors, variances), temperature, present)
    assert (weights >= 0.0).all()
    assert (np.diag(weights) == 0.0).all()
    assert (weights[:, ~present] == 0.0).all()
    for i in range(count):
        others = np.count_nonzero(present) - int(present[i])
        assert weights[i].sum() == pytest.approx(1.0 if others else 0.0, abs=1e-12)


@given(matrices, st.randoms(use_true_random=False), st.floats(0.0, 100.0))
def test_permuting_the_clients_permutes_rows_and_columns(
    vectors: np.ndarray, random: Random, variance: float
) -> None:
    order = list(range(len(vectors)))
    random.shuffle(order)
    variances = variance * (1.0 + np.arange(len(vectors), dtype=np.float64))
    before = corrected_cosine(vectors, variances)
    after = corrected_cosine(vectors[order], variances[order])
    np.testing.assert_allclose(after.similarity, before.similarity[order][:, order], atol=1e-9)
    assert (after.significant == before.significant[order]).all()
    one = softmax_weights(before, 0.5, everybody(len(vectors)))
    two = softmax_weights(after, 0.5, everybody(len(vectors)))
    np.testing.assert_allclose(two, one[order][:, order], atol=1e-8)


@given(matrices)
def test_without_noise_the_corrected_cosine_is_the_cosine(vectors: np.ndarray) -> None:
    plain = plain_cosine(vectors)
    corrected = corrected_cosine(vectors, np.zeros(len(vectors)))
    np.testing.assert_allclose(corrected.similarity, plain.similarity, atol=1e-9)


def noisy_pairs(cosine: float, variances: tuple[float, float], draws: int) -> np.ndarray:
    """(draws, 2, K) noisy versions of two vectors of length 10 with a known cosine."""
    k = 256
    rng = np.random.default_rng(7)
    first = np.zeros(k)
    first[0] = 10.0
    second = np.zeros(k)
    second[:2] = 10.0 * cosine, 10.0 * math.sqrt(1 - cosine**2)
    noise = rng.normal(size=(draws, 2, k)) * np.sqrt(variances)[None, :, None]
    return np.stack([first, second])[None] + noise


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("variances", [(0.1, 0.1), (0.2, 0.05)])
def test_correction_removes_the_bias(cosine: float, variances: tuple[float, float]) -> None:
    draws = noisy_pairs(cosine, variances, 3000)
    noise = np.array(variances)
    estimates = np.array([corrected_cosine(pair, noise).similarity[0, 1] for pair in draws])
    raw = np.array([plain_cosine(pair).similarity[0, 1] for pair in draws])
    mean_error = estimates.std() / math.sqrt(len(estimates))
    # A ratio of unbiased estimates has a bias of the order of the squared noise; 0.01 bounds it here.
    assert estimates.mean() == pytest.approx(cosine, abs=0.01 + 4 * mean_error)
    attenuation = 1 / math.sqrt((1 + 256 * variances[0] / 100) * (1 + 256 * variances[1] / 100))
    assert raw.mean() == pytest.approx(cosine * attenuation, abs=0.01)


def test_pure_noise_is_rarely_significant_and_signal_is() -> None:
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(2000, 256)) * 2.0
    found = corrected_cosine(noise, np.full(2000, 4.0)).significant
    # ‖y‖² − Kv has mean 0 and standard deviation s: two of them are passed in about 2.8 % (χ² is skewed).
    assert 0.015 < found.mean() < 0.045
    signal = noise + 2.5
    assert corrected_cosine(signal, np.full(2000, 4.0)).significant.all()


def test_a_client_within_its_noise_receives_uniform_weights_and_others_do_not() -> None:
    rng = np.random.default_rng(5)
    vectors = np.stack([np.full(64, 5.0), np.full(64, 5.0), np.full(64, -5.0), np.zeros(64)])
    vectors += rng.normal(size=vectors.shape)
    found = corrected_cosine(vectors, np.ones(4))
    assert found.significant.tolist() == [True, True, True, False]
    weights = softmax_weights(found, 0.5, everybody(4))
    np.testing.assert_allclose(weights[3], [1 / 3, 1 / 3, 1 / 3, 0.0])
    assert weights[0, 1] > 10 * weights[0, 2]


def test_clients_without_a_usable_profile_are_neutral() -> None:
    known = Profile(np.array([1.0, 0.0, 0.0], dtype=np.float32), 0.0, 1)
    alike = Profile(np.array([2.0, 0.1, 0.0], dtype=np.float32), 0.0, 1)
    other = Profile(np.array([0.0, 0.0, 1.0], dtype=np.float32), 0.0, 1)
    zero = Profile(np.zeros(3, dtype=np.float32), 0.0, 1)
    for similarity in ("corrected", "cosine"):
        found = relevance([known, alike, other, zero, None], similarity)
        assert np.isnan(found.similarity[3]).all()
        assert np.isnan(found.similarity[:, 4]).all()
        assert found.significant.tolist() == [True, True, True, False, False]
        weights = softmax_weights(found, 0.5, everybody(5))
        np.testing.assert_allclose(weights[4], [0.25, 0.25, 0.25, 0.25, 0.0])
        # The mean similarity of the row: between the related and the unrelated contributor.
        assert weights[0, 1] > weights[0, 3] > weights[0, 2]
        assert weights[0, 3] == weights[0, 4]


def test_nobody_has_a_profile() -> None:
    found = relevance([None, None, None], "corrected")
    np.testing.assert_allclose(softmax_weights(found, 0.5, everybody(3)).sum(axis=1), 1.0)
    assert not found.significant.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_count_as_no_profile(bad: float) -> None:
    vectors = np.array([[1.0, 2.0], [bad, 1.0], [2.0, 1.0]])
    for found in (plain_cosine(vectors), corrected_cosine(vectors, np.zeros(3))):
        assert np.isnan(found.similarity[1]).all()
        assert found.similarity[0, 2] == pytest.approx(0.8)


@pytest.mark.parametrize("size", [3.4e38, 1e-45])
def test_extreme_float32_values_neither_overflow_nor_vanish(size: float) -> None:
    vectors = np.array([[size, size], [size, 0.0], [size, size]], dtype=np.float32).astype(np.float64)
    with np.errstate(all="raise", under="ignore"):
        for found in (plain_cosine(vectors), corrected_cosine(vectors, np.zeros(3))):
            assert found.similarity[0, 2] == pytest.approx(1.0)
            assert found.similarity[0, 1] == pytest.approx(1 / math.sqrt(2), rel=1e-6)


def test_a_lie_about_enormous_noise_only_costs_the_liar() -> None:
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(4, 32)) + 1.0
    honest = corrected_cosine(vectors, np.full(4, 0.01))
    lied = corrected_cosine(vectors, np.array([0.01, 0.01, 0.01, 1e30]))
    np.testing.assert_allclose(lied.similarity[:3, :3], honest.similarity[:3, :3], atol=1e-6)
    assert not lied.significant[3]
    assert np.isfinite(lied.similarity).all()


@given(matrices, st.lists(st.sampled_from("xyz"), min_size=7, max_size=7), st.permutations(range(7)))
def test_families_weigh_their_own_only(vectors: np.ndarray, names: list[str], order: list[int]) -> None:
    """Within a family the weights are those of a federation of its own, whatever the order of the clients."""
    found, families = plain_cosine(vectors), np.array(names[: len(vectors)])
    weights = softmax_weights(found, 0.5, everybody(len(vectors)), families=list(families))
    assert (weights[families[:, None] != families] == 0.0).all()
    for name in families:
        kin = np.flatnonzero(families == name)
        alone = Relevance(found.similarity[np.ix_(kin, kin)], found.significant[kin])
        expected = softmax_weights(alone, 0.5, everybody(len(kin)))
        np.testing.assert_array_equal(weights[np.ix_(kin, kin)], expected)
    order = [index for index in order if index < len(vectors)]
    moved = Relevance(found.similarity[np.ix_(order, order)], found.significant[order])
    again = softmax_weights(moved, 0.5, everybody(len(order)), families=list(families[order]))
    np.testing.assert_allclose(again, weights[np.ix_(order, order)], rtol=1e-12, atol=0)


def test_only_wanted_rows_are_filled() -> None:
    found = plain_cosine(np.eye(4) + 0.1)
    wanted = np.array([True, False, True, False])
    weights = softmax_weights(found, 0.5, everybody(4), wanted)
    np.testing.assert_allclose(weights.sum(axis=1), wanted.astype(float))


def test_low_temperature_does_not_overflow() -> None:
    weights = softmax_weights(plain_cosine(np.eye(3) + 0.5), 1e-300, everybody(3))
    assert np.isfinite(weights).all()
    assert isinstance(plain_cosine(np.eye(2)), Relevance)


def test_blocks_of_the_matrix_fit_together() -> None:
    vectors = np.random.default_rng(3).normal(size=(1100, 6))
    vectors[700] = np.nan
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = units @ units.T
    np.fill_diagonal(expected, np.where(np.isfinite(np.diagonal(expected)), 1.0, np.nan))
    for found in (plain_cosine(vectors), corrected_cosine(vectors, np.zeros(1100))):
        np.testing.assert_allclose(found.similarity, expected, atol=1e-12)
        np.testing.assert_array_equal(found.similarity, found.similarity.T)
