"""What recipients who put their aggregates together know about single adapters.

An aggregate is one linear equation in the adapters of the others. A coalition knows its own adapters and
all its rows, so its equations are the rows without its own columns. Its best linear estimate of the
adapters outside is their projection onto the space that these rows span: with P the projector, the estimate
of adapter j has the relative error √(1 − P_jj), if adapters are unrelated and of one size. Error 0 means
that adapter j is solved for; an error that is merely small is hardly better, so both count.

Rows are numbers of few bits, so even rows that are meant to be alike differ by a unit here and there: the
difference of two such rows is an equation in the few adapters where they do.

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


def estimate_errors(weights_EU: FloatArray) -> FloatArray:
    """Relative error of the best linear estimate of every adapter outside a coalition.

    Args:
        weights_EU: the coalition's rows without its own columns.

    Returns:
        (U,) from 0, solved for, to 1, nothing known.
    """
    _, values, directions = np.linalg.svd(weights_EU, full_matrices=False)
    kept = directions[values > _PARALLEL * values.max(initial=0.0)]
    return np.asarray(np.sqrt(np.maximum(0.0, 1.0 - np.einsum("eu,eu->u", kept, kept))))


def pair_errors(member: int, row_N: FloatArray, others: Sequence[int], rows_RN: FloatArray) -> FloatArray:
    """What one recipient and each of some others solve for, two at a time.

    `estimate_errors` of two rows in closed form: with a, b the rows without the pair's own columns,
    P_jj = (a_j² ⟨b,b⟩ − 2 a_j b_j ⟨a,b⟩ + b_j² ⟨a,a⟩) / (⟨a,a⟩⟨b,b⟩ − ⟨a,b⟩²).

    Args:
        member: index of the recipient.
        row_N: its weights; its own is 0.
        others: indices of the other recipients.
        rows_RN: their weights, each one's own 0.

    Returns:
        (R,) the least error over all adapters outside the pair.
    """
    a_RN = np.repeat(row_N[None, :], len(others), axis=0)
    b_RN = rows_RN.copy()
    a_RN[np.arange(len(others)), others] = 0.0
    b_RN[:, member] = 0.0
    aa, bb = (np.maximum(np.einsum("rn,rn->r", m, m), 1e-300) for m in (a_RN, b_RN))
    a_RN, b_RN = a_RN / np.sqrt(aa)[:, None], b_RN / np.sqrt(bb)[:, None]
    # Gram-Schmidt rather than the determinant, which cancels where rows are nearly parallel.
    rest_RN = b_RN - np.einsum("rn,rn->r", a_RN, b_RN)[:, None] * a_RN
    length = np.linalg.norm(rest_RN, axis=1)
    rest_RN = np.where((length > _PARALLEL)[:, None], rest_RN / np.maximum(length, _PARALLEL)[:, None], 0.0)
    return np.asarray(np.sqrt(np.maximum(0.0, 1.0 - (a_RN**2 + rest_RN**2).max(axis=1, initial=0.0))))


def counted_coalition(contributors: int, rows: int) -> int:
    """Size of the smallest coalition that has as many equations as unknown adapters, in general position.

    k recipients that are one another's contributors hold `rows` equations each in the other
    contributors − (k − 1) adapters. Rows in a special position, chosen so or by chance, need only two.

    Args:
        contributors: c, adapters in the smallest row.
        rows: R, rows of each recipient over the same adapters: 1 in one round; more where they hardly move.

    Returns:
        ⌈(c + 1) / (R + 1)⌉.
    """
    return -(-(contributors + 1) // (rows + 1))
