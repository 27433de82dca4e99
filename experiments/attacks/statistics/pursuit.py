"""Taking a sum of gradients apart term by term, against a Gaussian background of the terms not yet found.

The loss of a text is a sum over its tokens, so its gradient is a sum of terms, one for each token, and each
term depends on nothing but the tokens up to its own. Whoever knows the model and the tokens so far can
compute the term that every next token would give. It is compared with what is left of the release; what the
remaining n tokens add to it is unknown, but public texts tell its mean n·μ and its covariance n·Σ. With the
release's own noise, of covariance diag(s²), the log-likelihood of a candidate with term g is

    −½ D log q + constant,     q = (r − g − n·μ)ᵀ (n·Σ + diag(s²))⁻¹ (r − g − n·μ)

where the scale of the background has been fitted: the terms of one text are all larger or smaller than
those of another. In units of s, and along the eigenvectors of Σ in these units, the matrix is diagonal for
every n at once.

Shape legend: D numbers of a release, N public terms, V candidates, K atoms.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedmosaic.protos.errors import ConfigurationError

FloatArray = npt.NDArray[np.float64]

_FLOOR: Final = 1e-12
_LEAST: Final = 1e-300


@dataclass(frozen=True, eq=False)
class Background:
    """One unknown term on average, in coordinates in which noise is white.

    The (D,) standard deviation of the release's noise, above 0; (D, D) orthonormal axes as columns; along
    them the (D,) mean of a term and its variances, in units of the noise's.
    """

    noise: FloatArray
    axes: FloatArray
    mean: FloatArray
    spread: FloatArray

    def coordinates(self, vectors: FloatArray) -> FloatArray:
        """Vectors (..., D) in units of the noise, along the axes."""
        return np.asarray((vectors / self.noise) @ self.axes)


def fit_background(terms: FloatArray, noise: FloatArray, shrinkage: float = 0.05) -> Background:
    """Mean and covariance of the (N, D) terms of public texts; `ConfigurationError` if N < 2.

    The share `shrinkage` of the covariance is spread evenly, for directions that these texts do not show.
    """
    if len(terms) < 2 or not bool(np.all(noise > 0.0)) or not bool(np.isfinite(terms).all()):
        raise ConfigurationError(
            f"a background needs at least two finite terms and noise above 0 everywhere; got {len(terms)} "
            f"terms and a least noise of {float(np.min(noise)):g}"
        )
    white = terms / noise
    mean = white.mean(axis=0)
    centred = white - mean
    spread, axes = np.linalg.eigh(centred.T @ centred / len(white))
    spread = np.maximum(spread, 0.0)
    return Background(noise, axes, mean @ axes, (1.0 - shrinkage) * spread + shrinkage * spread.mean())


def log_likelihoods(
    left: FloatArray, atoms: FloatArray, coefficients: FloatArray, background: Background, remaining: float
) -> FloatArray:
    """(V,) log-likelihood of every candidate term, up to a constant that is the same for all.

    Candidates are combinations (V, K) of atoms (K, D). What is left of the release, (D,), has n ≥ 0 other
    terms in it, not necessarily whole; both are in the background's coordinates. Values compare between sums
    of one n.
    """
    weights = 1.0 / (1.0 + remaining * background.spread)
    unexplained = left - remaining * background.mean
    weighted = atoms * weights
    gram, along = weighted @ atoms.T, weighted @ unexplained
    whole = float(unexplained @ (weights * unexplained))
    energy = whole + np.einsum("vk,vk->v", coefficients @ gram, coefficients) - 2.0 * coefficients @ along
    return np.asarray(-0.5 * len(left) * np.log(np.maximum(energy, max(_FLOOR * whole, _LEAST))))


def unexplained_terms(left: FloatArray, background: Background) -> float:
    """How many average terms would have as much energy as the (D,) rest of a release."""
    energy = max(0.0, float(left @ left) - len(left))
    common, own = float(background.mean @ background.mean), float(background.spread.sum())
    # n terms have the energy n·own + n²·common on average.
    return energy / (0.5 * own + math.sqrt(0.25 * own**2 + common * energy)) if energy else 0.0
