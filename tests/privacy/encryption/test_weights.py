"""Integer weights: sums, distances, symmetry."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from fedmosaic.privacy.policy import integer_weights
from fedmosaic.protos.errors import PolicyError

raw_rows = arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(0.0, 1e3)).filter(
    lambda row: row.sum() > 1e-3
)


@settings(deadline=None)
@given(row=raw_rows, bits=st.integers(1, 30))
def test_rows_sum_to_the_power_and_stay_close(row: NDArray[np.float64], bits: int) -> None:
    shares = row / row.sum()
    integers = integer_weights(shares, bits)
    assert int(integers.sum()) == 1 << bits
    assert integers.dtype == np.int64
    assert (integers >= 0).all()
    assert (integers[shares == 0.0] == 0).all()
    assert (np.abs(integers - shares * (1 << bits)) < 1.0 + 1e-6).all()


def test_by_hand() -> None:
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
