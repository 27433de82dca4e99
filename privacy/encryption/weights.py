"""Integer weights: a row of shares as whole numbers that sum to a power of two."""

import numpy as np
from numpy.typing import NDArray

from fedmosaic.protos import bounds
from fedmosaic.protos.errors import PolicyError


def integer_weights(row: NDArray[np.float64], bits: int) -> NDArray[np.int64]:
    """Round (m,) shares ≥ 0 that sum to 1 within 1e-6 to integers that sum to 2**bits, by largest remainder.

    Every integer differs from its exact share by less than one; zeros stay zero, equal remainders are served
    in order of position. PolicyError if it is no row of shares.
    """
    shares = np.asarray(row, dtype=np.float64)
    if not 1 <= bits <= bounds.MAX_WEIGHT_BITS:
        raise PolicyError(f"weights of {bits} bits were asked for, expected 1 to {bounds.MAX_WEIGHT_BITS}")
    if shares.ndim != 1 or shares.size == 0:
        raise PolicyError(
            f"a weight row has shape {shares.shape}, expected (m,) with at least one contributor"
        )
    if not np.isfinite(shares).all() or (shares < 0.0).any():
        raise PolicyError("weights must be finite and not negative")
    total = float(shares.sum())
    if abs(total - 1.0) > 1e-6:
        raise PolicyError(f"weights sum to {total:.9g}, expected 1: normalise the row first")
    scaled = shares / total * (1 << bits)
    integers = np.floor(scaled).astype(np.int64)
    missing = (1 << bits) - int(integers.sum())
    by_remainder = np.argsort(integers - scaled, kind="stable")
    integers[by_remainder[:missing]] += 1
    return integers
