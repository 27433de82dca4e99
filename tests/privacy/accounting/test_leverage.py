"""The noise of a group's sum against the general form: leverage scores by definition, every coalition."""

import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmosaic.privacy.accounting.leverage import effective_noise_multiplier, noise_share
from fedmosaic.protos.errors import AccountingError

Array: TypeAlias = npt.NDArray[np.float64]


def leverage(weights: Array, noise: Array, member: int, coalition: Sequence[int] = ()) -> float:
    """s² hᵀ (Σ s_k² h_k h_kᵀ)⁺ h over those outside the coalition; see `privacy.accounting.leverage`."""
    honest = [k for k in range(len(noise)) if k not in coalition]
    covariance = sum(noise[k] ** 2 * np.outer(weights[:, k], weights[:, k]) for k in honest)
    return float(noise[member] ** 2 * weights[:, member] @ np.linalg.pinv(covariance) @ weights[:, member])


@given(st.integers(2, 8), st.integers(0, 7), st.floats(0.01, 10.0))
def test_disjoint_groups_have_the_closed_form_and_no_coalition_is_worse_than_the_largest(
    members: int, colluders: int, noise: float
) -> None:
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
    found = effective_noise_multiplier(noise, members, colluders)
    assert math.isclose(noise / math.sqrt(worst), found, rel_tol=1e-6)


def test_shared_noise_is_the_noise_of_the_group_whatever_t_members_leave_out() -> None:
    share = noise_share(2.0, 12, 3)
    weights = np.ones((1, 12))
    for missing in range(4):
        noise = np.full(12, share)
        noise[1 : 1 + missing] = 0.0
        assert share / math.sqrt(leverage(weights, noise, 0)) >= 2.0 - 1e-9
    noise[1:5] = 0.0
    assert share / math.sqrt(leverage(weights, noise, 0)) < 1.9, "one more, and the promise is broken"


def test_overlapping_groups_cost_more_than_either() -> None:
    """Two sums with one member apart give that member away: their difference is its vector."""
    weights = np.array([[1.0] * 6, [1.0] * 5 + [0.0]])
    assert math.isclose(leverage(weights, np.ones(6), 5), 1.0)
    assert leverage(weights[:1], np.ones(6), 5) < 0.2


@pytest.mark.parametrize(("contributors", "coalition"), [(3, 3), (3, -1)])
def test_a_group_of_colluders_is_refused(contributors: int, coalition: int) -> None:
    with pytest.raises(AccountingError, match="at least one must be honest"):
        effective_noise_multiplier(1.0, contributors, coalition)
