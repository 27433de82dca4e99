"""A group's noisy sum from its members' shares: exact, bounded, with the noise of all."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmosaic.privacy.mechanism.gaussian import ClippedSum, clipped_sum
from fedmosaic.privacy.mechanism.noise import SecureNoise
from fedmosaic.privacy.mechanism.shares import LEAST_STEPS, ShareGrid, noisy_share, plan_grid
from fedmosaic.protos.errors import MechanismError


class Largest:
    """The largest draws that Box and Muller's formula gives from 53 bits."""

    is_test = True

    def gaussian(self, size: int, standard_deviation: float) -> npt.NDArray[np.float64]:
        return np.full(size, 2 * math.sqrt(2 * 53 * math.log(2)) * math.sqrt(2) / 2 * standard_deviation)


@given(
    st.sampled_from([6, 12, 100, 1000]),
    st.integers(1, 64),
    st.floats(0.05, 3.0),
    st.sampled_from([32, 40, 62]),
)
def test_shares_never_wrap_whatever_is_summed(members: int, batch: int, noise: float, bits: int) -> None:
    try:
        grid = plan_grid(members, batch, noise, bits)
    except MechanismError:
        return
    worst = ClippedSum(np.full(3, 2**60), 0, 0, 1)
    share = noisy_share(worst, grid, Largest())
    assert members * int(share.max()) < 2 ** (bits - 1)
    assert grid.limit >= 4 * batch * grid.steps, "no usual sum is clamped"


def test_a_large_group_of_small_noise_needs_more_bits() -> None:
    with pytest.raises(MechanismError, match="use more bits"):
        plan_grid(1000, 1000, 0.05, 32)
    assert plan_grid(1000, 1000, 0.05, 48).steps * 0.05 >= LEAST_STEPS


def test_noise_that_no_grid_has_room_for_is_refused() -> None:
    # A step of one clipping norm has 256 steps of this noise, and yet no room for twelve deviations.
    with pytest.raises(MechanismError, match="use more bits"):
        plan_grid(100, 1, 300.0, 16)


@given(st.integers(0, 2**32), st.sampled_from([2**12, 2**16, 2**20]))
def test_one_example_moves_a_clamped_sum_by_one_clipping_norm_at_most(seed: int, steps: int) -> None:
    source = np.random.default_rng(seed)
    rows = source.normal(size=(5, 4)) * 10.0 ** source.uniform(-3, 3)
    limit = int(source.integers(1, 3 * steps))
    sums = [np.clip(clipped_sum(rows[: 5 - left], 0.7, steps).units, -limit, limit) for left in (0, 1)]
    moved = [int(value) for value in sums[0] - sums[1]]
    assert sum(value**2 for value in moved) <= steps**2


def test_the_noise_of_a_sum_is_that_of_all_shares_together() -> None:
    grid, size = plan_grid(12, 8, 0.5, 32), 20_000
    nothing = ClippedSum.empty(size)
    total = np.sum([noisy_share(nothing, grid, SecureNoise()) for _ in range(12)], axis=0) / grid.steps
    # A standard deviation from 20,000 draws is exact to 0.5 %, so this is eight of its errors.
    assert abs(total.std() / (0.5 * math.sqrt(12)) - 1.0) < 0.04
    assert abs(total.mean()) < 0.1


def test_the_share_is_the_sum_where_there_is_no_noise_to_add() -> None:
    grid = ShareGrid(2**16, 0.0, 2**30, 40)
    total = clipped_sum(np.array([[0.5, -0.25], [0.1, 0.2]]), 1.0, grid.steps)
    share = noisy_share(total, grid, SecureNoise())
    assert np.allclose(share / grid.steps, [0.6, -0.05], atol=1e-4)
