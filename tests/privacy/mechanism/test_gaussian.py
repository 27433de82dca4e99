"""The Gaussian arithmetic of both channels: one example moves the sum by at most C, and the grid holds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import stats

from fedmosaic.client.dp import engine, training
from fedmosaic.privacy.mechanism import profile
from fedmosaic.privacy.mechanism.gaussian import GRID, ClippedSum, clip, clipped_sum, noisy_sum
from fedmosaic.privacy.mechanism.noise import Float64Array, SeededTestNoise


def exact_norm_squared(units: np.ndarray) -> int:
    return sum(int(value) ** 2 for value in units)


any_double = st.floats(allow_nan=True, allow_infinity=True, width=64)
hostile_rows = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=any_double)
norms = st.floats(1e-5, 1e5)


@given(rows=hostile_rows, clipping_norm=norms)
def test_every_row_is_within_the_bound_in_exact_arithmetic(rows: Float64Array, clipping_norm: float) -> None:
    units, _ = clip(rows, clipping_norm)
    assert all(exact_norm_squared(row) <= GRID**2 for row in units)


@given(rows=hostile_rows, clipping_norm=norms, data=st.data())
def test_removing_any_example_moves_the_sum_by_at_most_c(
    rows: Float64Array, clipping_norm: float, data: st.DataObject
) -> None:
    removed = data.draw(st.integers(0, len(rows) - 1))
    whole = clipped_sum(rows, clipping_norm)
    rest = clipped_sum(np.delete(rows, removed, axis=0), clipping_norm)
    assert exact_norm_squared(whole.units - rest.units) <= GRID**2
    assert whole.rows == rest.rows + 1


@pytest.mark.parametrize("size", [3, 1000, 2**16])
def test_long_rows_stay_within_the_bound(size: int) -> None:
    rows = np.random.default_rng(0).standard_normal((3, size)) * [[1e3], [1e-3], [1e300]]
    units, _ = clip(rows, 1e-2)
    assert all(exact_norm_squared(row) <= GRID**2 for row in units)
    # And use the bound: a row that is clipped keeps its length but for truncation.
    assert exact_norm_squared(units[0]) >= (GRID - math.sqrt(size) - 1) ** 2


@given(
    rows=arrays(np.float64, (3, 5), elements=st.floats(-1e3, 1e3, allow_subnormal=False)),
    clipping_norm=st.floats(0.1, 10),
)
def test_clip_against_the_textbook(rows: Float64Array, clipping_norm: float) -> None:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    expected = rows / np.maximum(1.0, lengths / clipping_norm) / clipping_norm
    units, shortened = clip(rows, clipping_norm)
    np.testing.assert_allclose(units / GRID, expected, atol=1.1 / GRID)
    far = np.abs(lengths[:, 0] / clipping_norm - 1) > 1e-9
    assert np.array_equal(shortened[far], lengths[far, 0] > clipping_norm)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_counts_as_zero(bad: float) -> None:
    good = np.array([[0.1, 0.2, 0.0, 0.0], [0.0, 0.0, 0.3, 0.0]])
    rows = np.vstack([good, [[bad, 1.0, 1.0, 1.0]]])
    total = clipped_sum(rows, 1.0)
    assert np.array_equal(total.units, clipped_sum(good, 1.0).units)
    assert (total.rejected, total.clipped, total.rows) == (1, 0, 3)


def test_the_sum_does_not_depend_on_order_or_batches() -> None:
    rows = np.random.default_rng(1).standard_normal((100, 4)) * 10.0 ** np.arange(-4, 0)
    whole = clipped_sum(rows, 1.0)
    parts = [clipped_sum(part, 1.0) for part in np.array_split(rows[::-1], 7)]
    total = ClippedSum.empty(4)
    for part in parts:
        total += part
    assert np.array_equal(total.units, whole.units)
    assert (total.rows, total.clipped) == (whole.rows, whole.clipped)


def test_noise_does_not_shrink_with_the_number_of_examples() -> None:
    for count in (1, 1000):
        total = clipped_sum(np.ones((count, 4)), 0.5)
        source = SeededTestNoise(count)
        noise = np.array([noisy_sum(total, 0.5, 3.0, source) for _ in range(2000)])
        noise -= total.units * (0.5 / GRID)
        assert stats.kstest(noise.ravel() / 1.5, "norm").pvalue > 1e-6


class FixedNoise:
    """Noise that an adversarial test chooses."""

    is_test = True

    def __init__(self, value: float) -> None:
        self.value = value

    def gaussian(self, size: int, standard_deviation: float) -> Float64Array:
        return np.full(size, self.value * standard_deviation)


def test_the_release_is_on_the_public_grid_whatever_the_data() -> None:
    """Low bits must not tell the sum (Mironov 2012): every release is an integer times C / 2^24."""
    for sums in ([0, 0, 0, 0], [1, 2, 3, 4], [-GRID, GRID // 3, 7, 0]):
        total = ClippedSum(np.array(sums, dtype=np.int64), 0, 0, 1)
        released = noisy_sum(total, 0.5, 1.0, FixedNoise(math.pi / 8))
        steps = released * GRID / 0.5
        assert np.array_equal(steps, np.rint(steps))
        # Adding to the integer sum first and rounding then gives the same: nothing but post-processing.
        expected = np.rint(np.array(sums) + math.pi / 8 * GRID) * (0.5 / GRID)
        assert np.array_equal(released, expected)


def test_both_channels_give_the_bytes_they_always_gave() -> None:
    """Golden values, of rows and noise whose every intermediate result is exact in any order."""
    rows = np.array([[3.0, 4.0], [0.375, 0.5], [math.nan, 1.0], [0.0, -1e30]], dtype=np.float32)
    noise = FixedNoise(0.3125)
    described = profile.ProfileMechanism(
        probe="tiny",
        probe_sha256="0" * 64,
        reduction=profile.Reduction(hidden_size=2, intermediate_size=2, projection_dimensions=2),
        clipping_norm=2.0,
        noise_multiplier=4.0,
    )
    total = profile.clipped_sum(rows, described)
    assert (total.units.tolist(), total.clipped, total.rejected, total.rows) == ([13212056, 838860], 2, 1, 4)
    assert profile.release(total, described, noise).tobytes().hex() == "6666824066662640"

    total = engine.clip_and_sum(torch.from_numpy(rows), 2.0)
    assert (total.units.tolist(), total.clipped, total.rejected, total.rows) == ([13212056, 838860], 2, 1, 4)
    assert (
        training.noisy_sum(total, 2.0, 4.0, noise).numpy().tobytes().hex()
        == "000000c0cc4c1040000000c0cccc0440"
    )
