"""Self, Others, A_last, A_AUC and intervals against closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmosaic.experiments.scenario import metrics
from fedmosaic.protos.errors import ConfigurationError


def test_others_is_a_mean_over_clients_of_means_over_tasks() -> None:
    # Client b has three tasks and c one: each client counts once, not each task.
    scores = {"a/x": 1.0, "a/y": 0.5, "b/x": 0.0, "b/y": 0.3, "b/z": 0.6, "c/x": 0.9}
    own, others = metrics.client_scores("a", scores)
    assert own == 0.75
    assert others == pytest.approx((0.3 + 0.9) / 2)


def test_a_client_without_others_has_no_others_figure_and_does_not_pull_the_mean() -> None:
    alone = metrics.client_scores("a", {"a/x": 0.4})
    other = metrics.client_scores("b", {"b/x": 0.6, "a/x": 0.2})
    assert alone.own == 0.4
    assert math.isnan(alone.others)
    assert metrics.mean_pair([alone, other]) == metrics.Pair(0.5, 0.2)


def test_three_values_give_students_interval() -> None:
    result = metrics.interval([1.0, 2.0, 3.0])
    assert result is not None
    # t(0.975, 2) = 4.302652729911275; standard error = 1 / sqrt(3)
    assert result.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert (result.mean, result.count) == (2.0, 3)
    assert metrics.interval([0.5]) == metrics.Interval(0.5, None, 1)


def test_nothing_and_a_missing_value_give_no_mean() -> None:
    assert metrics.interval([]) is None
    assert metrics.interval([0.5, math.nan]) is None


def test_scores_that_are_missing_or_not_finite_are_refused() -> None:
    with pytest.raises(ConfigurationError):
        metrics.client_scores("a", {})
    with pytest.raises(ConfigurationError):
        metrics.client_scores("a", {"a/x": math.nan})


scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)


@given(positive=scores, negative=scores)
def test_area_under_curve_is_the_share_of_pairs_won(positive: list[float], negative: list[float]) -> None:
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    found = metrics.area_under_curve(positive, negative)
    assert found == pytest.approx(wins / (len(positive) * len(negative)))
