"""The aggregation policy: what is refused, by which name, and what capping does."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from pydantic import ValidationError

from fedmosaic.privacy.policy import (
    AggregationPolicy,
    cap_weights,
    check_row,
    integer_weights,
    spread_weights,
)
from fedmosaic.protos.errors import PolicyError
from fedmosaic.protos.messages import WeightRow

POLICY = AggregationPolicy()
MEMBERS = ("a", "b", "c", "d", "e")


def row(**changes: object) -> WeightRow:
    fields: dict[str, object] = {"contributors": ("b", "c", "d"), "weights": (1229, 1638, 1229), "bits": 12}
    return WeightRow(**(fields | changes))  # type: ignore[arg-type]  # fields of several types


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contributors": ("b", "c", "x")}, "outside the roster: x"),
        ({"contributors": ("a", "c", "d")}, "its own weight must be 0"),
        ({"contributors": ("b",), "weights": (4096,)}, "has 1 contributors"),
        ({"weights": (2048, 2048, 0)}, "has 2 contributors"),
        ({"weights": (0, 4096, 0)}, "at least 3 are required"),
        ({"weights": (4094, 1, 1)}, "above the cap of 0.5"),
        ({"weights": (2049, 2046, 1)}, "above the cap of 0.5"),
        # Each below one half, and two make up all of it but a four-thousandth.
        ({"weights": (2048, 2047, 1)}, r"sum to 0\.4998, above the cap of 0\.36: 2\.00 contributors"),
        ({"weights": (2048, 1024, 1024)}, r"sum to 0\.3750, above the cap of 0\.36"),
    ],
)
def test_each_violation_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        check_row("a", row(**changes), POLICY, members=MEMBERS)


def test_own_contribution_of_weight_zero_does_not_count() -> None:
    with_self = row(contributors=("a", "b", "c", "d"), weights=(0, 1229, 1638, 1229))
    check_row("a", with_self, POLICY, members=MEMBERS)
    too_few = row(contributors=("a", "b", "c"), weights=(0, 2048, 2048))
    with pytest.raises(PolicyError, match="has 2 contributors"):
        check_row("a", too_few, POLICY)


def test_a_share_rounded_up_at_the_cap_passes() -> None:
    policy = AggregationPolicy(weight_cap=0.4, squares_cap=0.5)
    check_row("a", row(weights=(1639, 1639, 818)), policy)  # 0.4 · 4096 = 1638.4
    with pytest.raises(PolicyError, match=r"'b' has a share of 0\.4004"):
        check_row("a", row(weights=(1640, 1639, 817)), policy)


@pytest.mark.parametrize(
    "field",
    [
        {"weight_cap": 0.0},
        {"weight_cap": 1.5},
        {"squares_cap": 0.0},
        {"squares_cap": math.nan},
        {"minimum_contributors": 0},
        {"x": 1},
    ],
)
def test_a_policy_that_cannot_hold_is_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        AggregationPolicy(**field)


weights_lists = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=12)


@given(weights=weights_lists, cap=st.floats(0.05, 1.0))
def test_capping_gives_shares_that_respect_the_cap(weights: list[float], cap: float) -> None:
    positive = sum(weight > 0 for weight in weights)
    if positive * cap < 1.0 - 1e-12:
        with pytest.raises(PolicyError, match="contributors with a weight above zero"):
            cap_weights(weights, cap)
        return
    shares = cap_weights(weights, cap)
    assert math.isclose(math.fsum(shares), 1.0, abs_tol=1e-9)
    assert all(0.0 <= share <= cap * (1 + 1e-12) for share in shares)
    assert all(share == 0.0 for share, weight in zip(shares, weights, strict=True) if weight == 0.0)
    # Below the cap, proportions are those of the input; and the order of sizes is kept.
    for left, share_left in zip(weights, shares, strict=True):
        for right, share_right in zip(weights, shares, strict=True):
            if share_left < cap * (1 - 1e-9) and share_right < cap * (1 - 1e-9):
                assert math.isclose(share_left * right, share_right * left, rel_tol=1e-9, abs_tol=1e-300)
            if left > right:
                assert share_left >= share_right * (1 - 1e-12)


def test_capping_by_hand() -> None:
    assert cap_weights([10.0, 1.0, 1.0, 0.0], 0.5) == (0.5, 0.25, 0.25, 0.0)
    # The second passes the cap only after the first was cut.
    assert cap_weights([8.0, 4.0, 1.0, 1.0], 0.4) == pytest.approx((0.4, 0.4, 0.1, 0.1))
    assert cap_weights([1e300, 1e-300, 1e-300], 0.5) == pytest.approx((0.5, 0.25, 0.25))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_weights_that_are_no_weights_are_refused(bad: float) -> None:
    with pytest.raises(PolicyError, match="finite and not negative"):
        cap_weights([0.5, bad, 0.5], 0.5)


@pytest.mark.parametrize("cap", [0.0, -1.0, 1.1, math.nan])
def test_a_cap_outside_its_range_is_refused(cap: float) -> None:
    with pytest.raises(PolicyError, match="weight cap"):
        cap_weights([1.0, 1.0], cap)


def test_two_contributors_never_make_up_more_than_their_share_of_squares() -> None:
    """The heaviest pair that any row of three may hold is 0.8 of it; of many, √(2 · 0.36) = 0.85."""
    for count, most in ((3, 0.8), (10, 0.85), (100, 0.85)):
        shares = cap_weights([1.0, 1.0, *([1e-9] * (count - 2))], 0.5)
        spread = spread_weights(shares, 0.36, 12)
        assert spread[0] == pytest.approx(spread[1])
        assert most - 0.03 < spread[0] + spread[1] < most
        assert spread[2] > 0.0


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=40), bits=st.sampled_from((8, 12, 15, 20)))
def test_spread_and_rounded_rows_pass_the_clients_check(weights: list[float], bits: int) -> None:
    shares = cap_weights(weights, 0.5)
    spread = spread_weights(shares, 0.36, bits)
    assert math.isclose(math.fsum(spread), 1.0, abs_tol=1e-9)
    assert min(spread) >= min(shares) - 1e-9
    order = np.argsort(shares, kind="stable")
    assert (np.diff(np.array(spread)[order]) >= -1e-12).all()
    names = tuple(f"c{number}" for number in range(len(weights)))
    integers = tuple(int(weight) for weight in integer_weights(np.array(spread), bits))
    check_row("a", WeightRow(names, integers, bits), AggregationPolicy(minimum_contributors=1))


def test_a_row_within_the_limit_is_left_as_it_is() -> None:
    assert spread_weights((0.35, 0.33, 0.32), 0.36, 12) == (0.35, 0.33, 0.32)
    assert spread_weights((0.5, 0.5, 0.0), 1.0, 12) == (0.5, 0.5, 0.0)
    with pytest.raises(PolicyError, match="at least 3 are needed"):
        spread_weights((0.5, 0.5, 0.0), 0.36, 12)


@pytest.mark.parametrize(
    ("policy", "fewest", "withstands"),
    [
        (AggregationPolicy(), 3, 1),
        (AggregationPolicy(minimum_contributors=1), 3, 1),
        (AggregationPolicy(minimum_contributors=1, weight_cap=1.0, squares_cap=1.0), 1, 0),
        (AggregationPolicy(weight_cap=0.2), 5, 2),
        (AggregationPolicy(weight_cap=1 / 3), 3, 1),
        (AggregationPolicy(squares_cap=0.24), 5, 2),
        (AggregationPolicy(minimum_contributors=9), 9, 2),
    ],
)
def test_the_limits_together_say_how_many_must_contribute(
    policy: AggregationPolicy, fewest: int, withstands: int
) -> None:
    assert (policy.fewest_contributors, policy.withstands) == (fewest, withstands)


raw_rows = arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(0.0, 1e3)).filter(
    lambda row: row.sum() > 1e-3
)


@given(row=raw_rows, bits=st.integers(1, 30))
def test_rows_sum_to_the_power_and_stay_close(row: NDArray[np.float64], bits: int) -> None:
    shares = row / row.sum()
    integers = integer_weights(shares, bits)
    assert int(integers.sum()) == 1 << bits
    assert integers.dtype == np.int64
    assert (integers >= 0).all()
    assert (integers[shares == 0.0] == 0).all()
    assert (np.abs(integers - shares * (1 << bits)) < 1.0 + 1e-6).all()


def test_rounding_by_hand() -> None:
    assert integer_weights(np.array([1 / 3, 1 / 3, 1 / 3]), 4).tolist() == [6, 5, 5]
    assert integer_weights(np.array([0.5, 0.5, 0.0]), 12).tolist() == [2048, 2048, 0]
    assert integer_weights(np.array([1 - 2e-9, 1e-9, 1e-9]), 12).tolist() == [4096, 0, 0]


@pytest.mark.parametrize(
    ("row", "bits", "message"),
    [
        ([0.5, 0.4], 12, "sum to 0.9"),
        ([0.0, 0.0], 12, "sum to 0"),
        ([1.5, -0.5], 12, "not negative"),
        ([np.nan, 1.0], 12, "finite"),
        ([], 12, "shape"),
        ([[1.0]], 12, "shape"),
        ([1.0], 0, "0 bits"),
        ([1.0], 31, "31 bits"),
    ],
)
def test_rows_that_are_no_shares_are_refused(row: list[float], bits: int, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        integer_weights(np.array(row), bits)
