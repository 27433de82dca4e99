"""A member's share of a group's noisy sum: its clipped sum and its part of the noise, as integers.

    u_j = clamp(Σ_{i in B_j} q_i) + round(N(0, (g·s)²))         q_i on a grid of g steps per clipping norm C
    y   = Σ_j u_j                                              exact, as long as nothing wraps

Only y is ever seen, so the noise that counts is that of all contributors together: with m of them of whom t
know their own, a Gaussian mechanism of noise multiplier s·√(m − t) (`fedmosaic.privacy.accounting.leverage`).

*Clamping* a sum to a box moves no two sums further apart, so the sensitivity stays C. *Nothing wraps*: the
clamp and the largest draw that `SecureNoise` can make leave room for m shares in b bits. *Rounding*: with ν
the unrounded noises and z = Σ_j ν_j, y = S + z + Σ_j (round(ν_j) − ν_j). Given z, the fractional parts of
the ν_j follow a Gaussian of at least g·s / √2 steps per direction, wrapped around the unit cube: that is
uniform, apart from z's own fractional part, up to a relative 2·exp(−(π·g·s)²), which is below 2^-1000 for
g·s ≥ 9; `LEAST_STEPS` is far above. S is an integer and leaves fractional parts alone, so y is made from S
+ z, the exact mechanism's output, by a rule that does not know S.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from fedmosaic.privacy.mechanism.gaussian import GRID, ClippedSum
from fedmosaic.privacy.mechanism.noise import IntArray, NoiseSource
from fedmosaic.protos.errors import MechanismError

LEAST_STEPS: Final = 256
"""Steps of the grid in one standard deviation of a member's noise."""
_LARGEST_DRAW: Final = 12.25
"""No draw of `SecureNoise` is larger, in standard deviations: 2 · √(2·53·ln 2) · √2 / 2 = 12.12."""
_ROOM: Final = 4
"""Clipped examples per expected one that may all point into one coordinate before a sum is clamped."""


@dataclass(frozen=True)
class ShareGrid:
    """The integers of a group's sum, public: g steps per clipping norm, noise s, the clamp, b bits."""

    steps: int
    noise: float
    limit: int
    bits: int


def plan_grid(members: int, expected_batch_size: int, noise: float, bits: int) -> ShareGrid:
    """The finest grid on which m shares of noise s cannot wrap in b bits; MechanismError asks for more."""
    largest = (1 << (bits - 1)) // members - 2
    steps = GRID
    while steps > 1 and steps * (_ROOM * expected_batch_size + _LARGEST_DRAW * noise) > largest:
        steps //= 2
    room = largest - int(np.ceil(_LARGEST_DRAW * noise * steps))
    if steps * noise < LEAST_STEPS or room < _ROOM * expected_batch_size * steps:
        raise MechanismError(
            f"{members} shares of {expected_batch_size} examples and noise {noise:g} do not fit {bits} bits "
            f"with {LEAST_STEPS} steps for a standard deviation of the noise: use more bits"
        )
    return ShareGrid(steps, noise, room, bits)


def noisy_share(total: ClippedSum, grid: ShareGrid, noise: NoiseSource) -> IntArray:
    """A member's noise and clipped sum, (D,) int64 for a secure sum alone; charged before it is drawn."""
    deviation = grid.noise * grid.steps
    bound = int(np.ceil(_LARGEST_DRAW * deviation))
    draws = np.rint(noise.gaussian(len(total.units), deviation)).astype(np.int64)
    return np.clip(total.units, -grid.limit, grid.limit) + np.clip(draws, -bound, bound)
