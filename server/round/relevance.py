"""Task relevance: from sanitised profiles to a similarity matrix and softmax weights.

All of it is post-processing of differentially private releases. Shape legend: N clients, K coordinates of
a profile.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedmosaic.protos.messages import Profile

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Similarity = Literal["corrected", "cosine"]

_BLOCK = 256
"""Rows and columns of the similarity matrix that are worked on at once."""
SIGNIFICANCE_GUARDS = 2.0
"""A profile counts as signal when its corrected squared norm is at least so many guards s."""


@dataclass(frozen=True, eq=False)
class Relevance:
    """How related the clients' tasks look, and how far that can be trusted.

    Attributes:
        similarity: (N, N) symmetric, in [-1, 1], diagonal 1; NaN where a client has no usable profile.
        significant: (N,) whether a client's profile stands out from its noise; where it does not, that
            client receives with uniform weights.
    """

    similarity: FloatArray
    significant: BoolArray


def relevance(profiles: Sequence[Profile | None], similarity: Similarity) -> Relevance:
    """Compare the profiles of all clients, in their order.

    Profiles are of one length, None where a client never sent one. "corrected" takes the known noise out of
    the norms; "cosine" is the paper's formula on the noisy vectors.
    """
    dimensions = next((profile.vector.size for profile in profiles if profile is not None), 1)
    missing = np.full(dimensions, np.nan)
    vectors_NK = np.array([missing if p is None else p.vector for p in profiles], dtype=np.float64)
    if similarity == "cosine":
        return plain_cosine(vectors_NK)
    return corrected_cosine(vectors_NK, np.array([0.0 if p is None else p.noise_variance for p in profiles]))


def plain_cosine(vectors_NK: FloatArray) -> Relevance:
    """Cosine of the vectors as they are: S_ij = ⟨y_i, y_j⟩ / (‖y_i‖ ‖y_j‖), without regard to noise.

    A row of `vectors_NK` with NaN or infinity, or of zeros, counts as no profile.

    Reference:
        FedMosaic (arXiv 2506.11024), relevance-guided aggregation, cosine of the sanitised gradients.
    """
    usable_N = _usable(vectors_NK)
    # Two steps, because the square of a large float32 vector's largest value must not overflow.
    rows_NK = np.where(usable_N[:, None], vectors_NK, 1.0)
    rows_NK = rows_NK / np.abs(rows_NK).max(axis=1, keepdims=True, initial=0.0)
    units_NK = rows_NK / np.linalg.norm(rows_NK, axis=1, keepdims=True)
    return Relevance(_similarities(units_NK, usable_N), usable_N)


def corrected_cosine(vectors_NK: FloatArray, variances_N: FloatArray) -> Relevance:
    """Cosine of the noise-free vectors (N, K), from noisy ones of known variance per coordinate (N,).

    Inner products of independent releases are unbiased; squared norms are too large by K·v. With
    n_i = ‖y_i‖² − K·v_i and the guard s_i = √(2K)·v_i, the standard deviation of pure noise's squared norm,

        S_ij = ⟨y_i, y_j⟩ / √(max(n_i, s_i) · max(n_j, s_j)),  clipped to [−1, 1].

    A client with n_i < 2 s_i is not significant. A row with NaN, infinity or only zeros counts as no profile.
    """
    dimensions = vectors_NK.shape[1]
    usable_N = _usable(vectors_NK) & np.isfinite(variances_N) & (variances_N >= 0.0)
    # Cosine is free of each client's scale; scaling each by its own keeps all squares in range.
    y_NK = np.where(usable_N[:, None], vectors_NK, 0.0)
    v_N = np.where(usable_N, variances_N, 0.0)
    scale_N = np.maximum(np.max(np.abs(y_NK), axis=1, initial=0.0), np.sqrt(v_N))
    scale_N = np.where(usable_N, scale_N, 1.0)
    y_NK, v_N = y_NK / scale_N[:, None], v_N / scale_N / scale_N
    guard_N = math.sqrt(2.0 * dimensions) * v_N
    norm_N = np.einsum("nk,nk->n", y_NK, y_NK) - dimensions * v_N
    significant_N = usable_N & (norm_N > 0.0) & (norm_N >= SIGNIFICANCE_GUARDS * guard_N)
    floor_N = np.where(usable_N, np.maximum(norm_N, guard_N), 1.0)
    floor_N = np.where(floor_N > 0.0, floor_N, 1.0)
    similarity_NN = _similarities(y_NK / np.sqrt(floor_N)[:, None], usable_N)
    return Relevance(similarity_NN, significant_N)


def softmax_weights(
    relevance_matrix: Relevance,
    temperature: float,
    present: BoolArray,
    recipients: BoolArray | None = None,
    families: Sequence[str] = (),
) -> FloatArray:
    """Weights with which every client receives from the others.

        w_ij = exp(S_ij / τ) / Σ_{k present, k ≠ i} exp(S_ik / τ)   for present j ≠ i;   w_ii = 0

    A client whose profile is not significant receives with uniform weights. A contributor without a
    profile gets the mean similarity of the row: nothing speaks for or against it.

    Args:
        relevance_matrix: from `relevance`.
        temperature: τ > 0.
        present: (N,) who contributes to this sum.
        recipients: (N,) whose rows are wanted; all by default.
        families: N names; k runs over the family of i, and w_ij = 0 outside it. One family if left out.

    Returns:
        (N, N) rows that sum to 1; rows of zeros where nobody else is present or the row is not wanted.

    Reference:
        FedMosaic (arXiv 2506.11024): softmax with temperature, the recipient excluded.
    """
    similarity_NN = relevance_matrix.similarity
    family_N = np.unique(families or [""] * len(similarity_NN), return_inverse=True)[1]
    weights_NN = np.zeros(similarity_NN.shape)
    for i in np.flatnonzero(np.ones_like(present) if recipients is None else recipients):
        others = present & (family_N == family_N[i])
        others[i] = False
        if not others.any():
            continue
        row = similarity_NN[i, others]
        known = np.isfinite(row)
        if not relevance_matrix.significant[i] or not known.any():
            weights_NN[i, others] = 1.0 / np.count_nonzero(others)
            continue
        logits = np.where(known, row, row[known].mean()) / temperature
        exponentials = np.exp(logits - logits.max())
        weights_NN[i, others] = exponentials / exponentials.sum()
    return weights_NN


def _usable(vectors_NK: FloatArray) -> BoolArray:
    usable_N: BoolArray = np.isfinite(vectors_NK).all(axis=1) & (vectors_NK != 0.0).any(axis=1)
    return usable_N


def _similarities(rows_NK: FloatArray, usable_N: BoolArray) -> FloatArray:
    """(N, N) inner products clipped to [-1, 1], by blocks above the diagonal: half a product is enough."""
    count = len(rows_NK)
    similarity_NN = np.empty((count, count))
    for i in range(0, count, _BLOCK):
        for j in range(i, count, _BLOCK):
            block = rows_NK[i : i + _BLOCK] @ rows_NK[j : j + _BLOCK].T
            np.clip(block, -1.0, 1.0, out=block)
            similarity_NN[i : i + _BLOCK, j : j + _BLOCK] = block
            similarity_NN[j : j + _BLOCK, i : i + _BLOCK] = block.T
    similarity_NN[~usable_N] = np.nan
    similarity_NN[:, ~usable_N] = np.nan
    np.fill_diagonal(similarity_NN, np.where(usable_N, 1.0, np.nan))
    return similarity_NN
