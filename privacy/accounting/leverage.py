"""What noise protects a member whose release is only ever seen in sums with others.

Members j add noise s_j (in clipping norms, per coordinate) to their own clipped sums, and only the rows of
y = H u are seen. An adversary who knows the noise of a coalition K has left, against member j,

    s_j / √ℓ_j(K),    ℓ_j(K) = s_j² h_jᵀ (Σ_{k ∉ K} s_k² h_k h_kᵀ)⁺ h_j ∈ (0, 1],

with h_j the j-th column of H: one example of j moves y by h_j Δᵀ with ‖Δ‖ ≤ C, and the noise of y that the
adversary does not know has that covariance per coordinate. ℓ_j is member j's leverage score; the scores of
the members outside K add up to the rank of H there, so what personalisation costs is its rank.

Shape legend: R group sums, N members.
"""

import math
from collections.abc import Collection
from typing import Final

import numpy as np
import numpy.typing as npt

from fedmosaic.protos.errors import AccountingError

FloatArray = npt.NDArray[np.float64]

_UNREACHED: Final = 1e-9
"""Share of a member's column, by length, that no noise reaches for it to count as unprotected."""


def leverage(
    weights_RN: FloatArray, noise_N: FloatArray, member: int, coalition: Collection[int] = ()
) -> float:
    """Leverage score ℓ of a member against a coalition.

    Args:
        weights_RN: H, the weight of each member in each sum that is seen.
        noise_N: s, each member's noise multiplier; 0 for one that adds none.
        member: index j, not of the coalition.
        coalition: indices of members whose noise the adversary knows.

    Returns:
        ℓ; `inf` where no noise is left in a direction in which the member counts.

    Raises:
        AccountingError: the member is of the coalition.
    """
    if member in coalition:
        raise AccountingError("a member of the coalition is not protected from itself")
    known = np.isin(np.arange(len(noise_N)), list(coalition))
    columns_RN = np.where(known, 0.0, weights_RN * noise_N)
    column_R = weights_RN[:, member]
    if not column_R.any():
        return 0.0
    # A sum may be told in any unit, and so may all noises together: neither changes the score, but sizes that
    # differ by orders of magnitude would let rounding decide which directions have noise.
    sizes_R1 = np.abs(weights_RN).max(axis=1, keepdims=True)
    rows = sizes_R1[:, 0] > 0.0
    columns_RN, column_R = columns_RN[rows] / sizes_R1[rows], column_R[rows] / sizes_R1[rows, 0]
    # The least squares solution of columns · x = column: its squared norm is hᵀ (columns columnsᵀ)⁺ h.
    solution_N, *_ = np.linalg.lstsq(columns_RN, column_R, rcond=None)
    missing_R = columns_RN @ solution_N - column_R
    # Singular values below N·ε of the largest are left out, and what noise reaches is met to about that share
    # of the column. More than 1e-9 of it that is not met has no noise in front of it, or as good as none.
    if np.linalg.norm(missing_R) > _UNREACHED * np.linalg.norm(column_R):
        return math.inf
    return float(noise_N[member] ** 2 * (solution_N @ solution_N))


def effective_noise_multiplier(noise: float, contributors: int, coalition: int) -> float:
    """Noise multiplier that protects a contributor of a group sum in which all weights and noises are equal.

    `leverage` in closed form for disjoint groups: s·√(m − t), since ℓ = 1 / (m − t).

    Args:
        noise: s, every contributor's own noise multiplier.
        contributors: m.
        coalition: t, contributors whose noise the adversary knows, or who added none; 0 for none.

    Raises:
        AccountingError: nobody honest is left.
    """
    if not 0 <= coalition < contributors:
        raise AccountingError(
            f"{coalition} of {contributors} contributors know their noise; at least one must be honest"
        )
    return noise * math.sqrt(contributors - coalition)


def noise_share(noise_multiplier: float, minimum_contributors: int, colluders: int) -> float:
    """Noise s that each of at least m_min contributors adds so that any m_min − t of them add σ together."""
    return noise_multiplier / effective_noise_multiplier(1.0, minimum_contributors, colluders)
