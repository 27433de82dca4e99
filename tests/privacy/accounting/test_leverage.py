"""Leverage scores against the definition, closed forms and every coalition."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmosaic.privacy.accounting.leverage import effective_noise_multiplier, leverage, noise_share
from fedmosaic.protos.errors import AccountingError


def _random_sums(seed, groups, members):
    source = np.random.default_rng(seed)
    return source.uniform(0.1, 1.0, (groups, members)), source.uniform(0.5, 2.0, members)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(4, 8), st.integers(0, 3))
def test_a_score_is_that_of_the_definition_and_scores_add_up_to_the_rank(seed, groups, members, coalition):
    weights, noise = _random_sums(seed, groups, members)
    known = set(range(coalition))
    honest = [j for j in range(members) if j not in known]
    covariance = sum(noise[k] ** 2 * np.outer(weights[:, k], weights[:, k]) for k in honest)
    scores = [leverage(weights, noise, j, known) for j in honest]
    expected = [noise[j] ** 2 * weights[:, j] @ np.linalg.pinv(covariance) @ weights[:, j] for j in honest]
    assert np.allclose(scores, expected, rtol=1e-6)
    assert math.isclose(sum(scores), np.linalg.matrix_rank(weights[:, honest]), rel_tol=1e-6)


@given(st.integers(2, 8), st.integers(0, 7), st.floats(0.01, 10.0))
def test_disjoint_groups_have_the_closed_form_and_no_coalition_is_worse_than_the_largest(
    members, colluders, noise
):
    if colluders >= members:
        return
    weights = np.zeros((2, members + 3))
    weights[0, :members] = 1.0
    weights[1, members:] = 1.0
    worst = max(
        leverage(weights, np.full(members + 3, noise), 0, coalition)
        for size in range(colluders + 1)
        for coalition in itertools.combinations(range(1, members + 3), size)
    )
    assert math.isclose(noise / math.sqrt(worst), effective_noise_multiplier(noise, members, colluders))


def test_shared_noise_is_the_noise_of_the_group_whatever_t_members_leave_out():
    share = noise_share(2.0, 12, 3)
    weights = np.ones((1, 12))
    for missing in range(4):
        noise = np.full(12, share)
        noise[1 : 1 + missing] = 0.0
        assert share / math.sqrt(leverage(weights, noise, 0)) >= 2.0 - 1e-9
    noise[1:5] = 0.0
    assert share / math.sqrt(leverage(weights, noise, 0)) < 1.9, "one more, and the promise is broken"


def test_overlapping_groups_cost_more_than_either():
    """Two sums with one member apart give that member away: their difference is its vector."""
    weights = np.array([[1.0] * 6, [1.0] * 5 + [0.0]])
    assert math.isclose(leverage(weights, np.ones(6), 5), 1.0)
    assert leverage(weights[:1], np.ones(6), 5) < 0.2


@given(st.integers(0, 2**32), st.lists(st.floats(1e-30, 1e30), min_size=2, max_size=2), st.integers(0, 3))
def test_the_unit_of_a_sum_changes_no_score(seed, units, member):
    weights, noise = _random_sums(seed, 2, 5)
    scaled = weights * np.array(units)[:, None]
    assert math.isclose(leverage(scaled, noise, member), leverage(weights, noise, member), rel_tol=1e-6)


@pytest.mark.parametrize("unit", [1e-13, 1.0, 1e13])
def test_a_sum_without_noise_is_seen_however_small_its_numbers(unit):
    """By an absolute tolerance, a column of 1e-13 counted as met by no noise at all."""
    weights = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) * unit
    assert leverage(weights, np.array([1.0, 1.0, 0.0]), 2) == math.inf


def test_no_noise_is_no_protection():
    assert leverage(np.ones((1, 3)), np.array([0.0, 0.0, 0.0]), 0) == math.inf
    assert leverage(np.array([[1.0, 1.0, 0.0]]), np.ones(3), 2) == 0.0, "not in any sum"


@pytest.mark.parametrize(("contributors", "coalition"), [(3, 3), (3, -1)])
def test_a_group_of_colluders_is_refused(contributors, coalition):
    with pytest.raises(AccountingError, match="at least one must be honest"):
        effective_noise_multiplier(1.0, contributors, coalition)
