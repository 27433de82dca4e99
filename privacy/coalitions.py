"""What recipients who put their aggregates together know about single adapters.

An aggregate is one linear equation in the adapters of the others. A coalition's equations are its rows
without its own columns. Its best linear estimate of the adapters outside is their projection onto the space
that these rows span: with P the projector, that of adapter j has the relative error √(1 − P_jj), if adapters
are unrelated and of one size. An error that is merely small is hardly better than 0.

Rows are numbers of few bits: the difference of two that are meant to be alike is an equation in few adapters.

Shape legend: E equations, R rows, N members, U members outside the coalition.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

SOLVED: Final = 0.1
"""Relative error below which an adapter counts as solved for."""
_PARALLEL: Final = 1e-6
"""Sine of the angle below which two rows count as one: their difference drowns in float32."""

_TINY: Final = 1e-300


def estimate_errors(weights_EU: FloatArray) -> FloatArray:
    """Relative error of the best linear estimate of every adapter outside a coalition.

    (U,) from 0, solved for, to 1, nothing known; the coalition's rows come without its own columns.
    """
    _, values, directions = np.linalg.svd(weights_EU, full_matrices=False)
    kept = directions[values > _PARALLEL * values.max(initial=0.0)]
    return np.asarray(np.sqrt(np.maximum(0.0, 1.0 - np.einsum("eu,eu->u", kept, kept))))


def pair_errors(member: int, row_N: FloatArray, others: Sequence[int], rows_RN: FloatArray) -> FloatArray:
    """What one recipient and each of some others solve for, two at a time: (R,) the least error.

    `estimate_errors` of two rows in closed form: with a, b the rows without the pair's own columns, P_jj =
    a_j² / ⟨a,a⟩ + (b_j − s a_j)² / (⟨b,b⟩ − s² ⟨a,a⟩), where s = ⟨a,b⟩ / ⟨a,a⟩. A recipient's own weight is 0
    in its row.
    """
    square_N = row_N * row_N
    aa_R = np.maximum(square_N.sum() - square_N[others], _TINY)
    bb_R = np.einsum("rn,rn->r", rows_RN, rows_RN) - rows_RN[:, member] ** 2
    slope_R = rows_RN @ row_N / aa_R
    rest_R = bb_R - slope_R * slope_R * aa_R
    apart_R = rest_R > _PARALLEL**2 * bb_R
    known_RN = rows_RN - slope_R[:, None] * row_N
    known_RN *= known_RN
    known_RN *= np.where(apart_R, 1.0 / np.where(apart_R, rest_R, 1.0), 0.0)[:, None]
    known_RN += square_N / aa_R[:, None]
    known_RN[:, member] = 0.0
    known_RN[np.arange(len(others)), others] = 0.0
    return np.asarray(np.sqrt(np.maximum(0.0, 1.0 - known_RN.max(axis=1, initial=0.0))))


def close_pairs(
    member: int,
    row_N: FloatArray,
    others: Sequence[int],
    rows_RN: FloatArray,
    squares_R: FloatArray,
    peaks_R: FloatArray,
) -> npt.NDArray[np.intp]:
    """Which of the others could solve for an adapter with a recipient; all others are surely far from it.

    With rows u, v of length 1 and c = ⟨u,v⟩, P_jj = (u_j² + v_j² − 2 c u_j v_j) / (1 − c²), which is at most
    (u_j² + v_j²) / (1 − |c|). One product with the rows in place of all that `pair_errors` needs, whose
    arguments come first; then the sum of the squares of each of `rows_RN`, and the largest of these squares.
    Positions in `others`, ascending.
    """
    square_N = row_N * row_N
    aa_R = np.maximum(square_N.sum() - square_N[others], _TINY)
    bb_R = np.maximum(squares_R - rows_RN[:, member] ** 2, _TINY)
    cosine_R = np.abs(rows_RN @ row_N) / (np.sqrt(aa_R) * np.sqrt(bb_R))
    # Solved is from 1 − SOLVED² on; what lies between leaves room for rounding.
    bound_R = square_N.max(initial=0.0) / aa_R + peaks_R / bb_R
    return np.flatnonzero(bound_R >= (1.0 - SOLVED) * (1.0 - cosine_R))


def counted_coalition(contributors: int, rows: int) -> int:
    """Size of the smallest coalition with as many equations as unknown adapters, in general position.

    k recipients that are one another's contributors hold `rows` equations each in the other
    contributors − (k − 1) adapters: k ≥ (contributors + 1) / (rows + 1). Rows in a special position,
    chosen so or by chance, need only two. Each has 1 row in one round; more where adapters hardly move.
    """
    return -(-(contributors + 1) // (rows + 1))
