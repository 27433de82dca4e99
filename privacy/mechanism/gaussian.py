"""The one Gaussian mechanism of both channels: clip on a grid of integers, sum exactly, add rounded noise.

    q_i = trunc(2^24 · z_i / max(‖z_i‖, C))                    clip, on a grid of integers
    y   = C · 2^-24 · (Σ_{i in B} q_i + round(N(0, (2^24 σ)²)))

The unit of privacy is one example under add/remove. It changes the sum by at most C in the L2 norm, whatever
its row is, so one release is a Gaussian mechanism of noise multiplier σ. The sum is noised, never a mean: how
many examples there are, or were sampled, is private under add/remove.

Truncation towards zero keeps every ‖q_i‖ within 2^24, and integers add exactly and in any order, so the
sensitivity does not grow by rounding (Casacuberta et al., "Widespread underestimation of sensitivity in
differentially private libraries and how to fix it", CCS 2022). For an integer S, S + round(G) = round(S + G):
the release is a function of the continuous Gaussian mechanism's output and keeps its exact (ε, δ), and the
set of values it may take does not depend on the data.

Between `clipped_sum` and `noisy_sum` the caller charges the release: durably, and before any noise is drawn.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from fedmosaic.privacy.mechanism.noise import Float64Array, IntArray, NoiseSource

FloatArray = npt.NDArray[np.floating]

GRID: Final = 2**24
"""Steps of the integer grid per clipping norm."""

MAXIMUM_DIMENSIONS: Final = 2**20
"""Most coordinates of a row for which the margin of `clip` is proved."""

# Keeps a row that is clipped within the bound although its norm was computed in doubles: the error of a
# sum of k squares is below k · 2^-53, and k is at most 2^20.
_NORM_MARGIN: Final = 1.0 - 2.0**-32


@dataclass(frozen=True, eq=False)
class ClippedSum:
    """A sum of clipped rows before noise: private, never to leave the process.

    `units` are (k,) int64, the sum in units of the grid. Of all `rows`, the bound shortened `clipped`, and
    `rejected` were not finite and count as zero.
    """

    units: IntArray = field(repr=False)
    clipped: int = field(repr=False)
    rejected: int = field(repr=False)
    rows: int = field(repr=False)

    def __add__(self, other: "ClippedSum") -> "ClippedSum":
        return ClippedSum(
            self.units + other.units,
            self.clipped + other.clipped,
            self.rejected + other.rejected,
            self.rows + other.rows,
        )

    @classmethod
    def empty(cls, dimensions: int) -> "ClippedSum":
        """The sum over no example, where every sum and an empty Poisson sample start."""
        return cls(np.zeros(dimensions, dtype=np.int64), 0, 0, 0)


def clip(rows: FloatArray, clipping_norm: float, grid: int = GRID) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Bring (n, k) rows of any values to the integer grid with an L2 norm of at most one clipping norm.

    C > 0 is in the unit of the rows, and the grid has g steps per C. Returns (n, k) int64 in units of C / g,
    every row's exact L2 norm at most g; and (n,) bool, which rows the bound shortened. A row with a value
    that is not finite becomes zero.
    """
    finite = np.isfinite(rows).all(axis=1, keepdims=True)
    values = np.where(finite, rows, 0.0).astype(np.float64)
    # Divided by its largest entry first, a row of 1e200 has a norm that a double can hold.
    largest = np.abs(values).max(axis=1, initial=0.0)
    scaled = values / np.where(largest > 0.0, largest, 1.0)[:, None]
    scaled_norm = np.linalg.norm(scaled, axis=1)
    directions = scaled / np.where(scaled_norm > 0.0, scaled_norm, 1.0)[:, None]
    with np.errstate(over="ignore"):
        lengths = largest * scaled_norm / clipping_norm
    shortened = lengths > 1.0
    units = np.trunc(directions * (np.minimum(lengths, 1.0) * (grid * _NORM_MARGIN))[:, None])
    return units.astype(np.int64), shortened


def clipped_sum(rows: FloatArray, clipping_norm: float, grid: int = GRID) -> ClippedSum:
    """Clip (n, k) rows of any values and add them up; sums of parts of the data may be added.

    Adding or removing any one row changes the private sum by at most C in the L2 norm.
    """
    units, shortened = clip(rows, clipping_norm, grid)
    rejected = np.count_nonzero(~np.isfinite(rows).all(axis=1))
    return ClippedSum(units.sum(axis=0), int(np.count_nonzero(shortened)), int(rejected), len(rows))


def noisy_sum(
    total: ClippedSum, clipping_norm: float, noise_multiplier: float, noise: NoiseSource
) -> Float64Array:
    """Draw noise and turn a private sum of k coordinates into (k,) float64 that may be used freely.

    The sum plus N(0, σ²C²) rounded to the grid, in the unit of the rows. Every call is one more event for the
    accountant, to be charged before it is made; `noise` is `SecureNoise()` in real runs.
    """
    draws = np.rint(noise.gaussian(len(total.units), noise_multiplier * GRID)).astype(np.int64)
    return np.asarray((total.units + draws) * (clipping_norm / GRID), dtype=np.float64)
