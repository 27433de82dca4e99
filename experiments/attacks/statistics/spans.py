"""Row and column space of a released gradient, and how well a vector fits into them.

A gradient G = Σ_t δ_t x_tᵀ over T tokens has rank at most T. While T is below its width, every true δ_t is in
the space that the leading left singular vectors span, every true x_t in that of the right ones, and almost
no wrong one does: tokens can be tested one by one.

Reference:
    Petrov et al. 2024, "DAGER: Exact gradient inversion for large language models" (arXiv:2405.15586).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Spans:
    """Both spaces of a released matrix.

    Attributes:
        left: (m, r) orthonormal columns.
        right: (f, r) orthonormal columns.
        noise_share: share of noise in the middle one of the directions that were kept, in [0, 1).
    """

    left: FloatArray
    right: FloatArray
    noise_share: float


def spans_of(released: FloatArray, noise: float, largest_rank: int) -> Spans:
    """Singular vectors of an (m, f) release that stand out of its noise; at least one is kept.

    A direction counts if its singular value is above the largest that noise of the standard deviation s per
    entry has alone, about s (√m + √f).
    """
    left, values, right = np.linalg.svd(released, full_matrices=False)
    edge = noise * (np.sqrt(released.shape[0]) + np.sqrt(released.shape[1]))
    floor = max(1.02 * float(edge), 1e-7 * float(values[0]))
    rank = max(1, min(largest_rank, int(np.count_nonzero(values > floor))))
    share = min(0.999, float((edge / max(values[rank // 2], 1e-300)) ** 2))
    return Spans(left[:, :rank], right[:rank].T, share)


def evidence(vectors: FloatArray, basis: FloatArray, floor: float) -> FloatArray:
    """How much better each of (n, m) vectors fits into a space than a vector from nowhere would.

    -log of the share of energy outside the space of the (m, r) orthonormal columns, at most -log(floor),
    where the floor > 0 is what noise keeps outside of a true vector; 0 for a vector of zeros.
    """
    energy = np.einsum("nm,nm->n", vectors, vectors)
    inside = np.einsum("nr,nr->n", vectors @ basis, vectors @ basis)
    outside = 1.0 - inside / np.maximum(energy, 1e-300)
    return np.asarray(np.where(energy > 0.0, -np.log(np.clip(outside, 0.0, 1.0) + floor), 0.0))
