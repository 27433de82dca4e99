"""Who was in a sum of gradients: dictionary least squares, and the likelihood ratio of the DP adversary.

A release is y = Σ_{i in B} g_i + N(0, s² I), and the adversary can recompute g_c of every candidate c, since
probe model and map are public. All of y that helps is in the inner products ⟨y, g_c⟩, so a gradient as
large as a layer is never formed: the Gram matrix K = (⟨g_i, g_j⟩) suffices, also to simulate releases.

Plain correlation ⟨y, g_c⟩/‖g_c‖ is kept for contrast. Gradients of one task point the same way, so it sees
mostly the task, and it passes releases that have no protection at all.

Shape legend: R releases, N candidates, K coordinates.
"""

from collections.abc import Sequence

import numpy as np

from fedmosaic.experiments.attacks.statistics import roc
from fedmosaic.experiments.attacks.statistics.results import CurvePoint, Figure
from fedmosaic.privacy.mechanism.projection import GradientFactors

_TOKENS_AT_ONCE = 2048


def draw_members(
    releases: int, candidates: int, rate: float, generator: np.random.Generator
) -> roc.BoolArray:
    """Put every candidate into every release independently, so that in and out differ by one example."""
    return np.asarray(generator.random((releases, candidates)) < rate)


def scored(
    scores: roc.FloatArray, members: roc.BoolArray, ceiling: roc.Ceiling, count: int = 16
) -> tuple[tuple[Figure, ...], tuple[CurvePoint, ...]]:
    """Figures and ROC of (R, N) scores, on the same few candidates of a release for every attack on it.

    All scores of a release share its noise, and candidates of one task are alike, so many scores of one
    release say little more than one. Rare false positives need many releases with few scores each.
    """
    choice = np.random.default_rng([len(members), count])
    used = np.argsort(choice.random(members.shape), axis=1) < count
    flat, truth = scores[used], members[used]
    return roc.membership_figures(flat, truth, ceiling, np.nonzero(used)[0]), roc.roc_points(flat, truth)


def gram_matrix(factors: Sequence[GradientFactors], kept_share: float = 1.0) -> roc.FloatArray:
    """(N, N) inner products ⟨G_i, G_j⟩ = Σ_{t,s} ⟨δ_it, δ_js⟩ ⟨x_it, x_js⟩ of gradients G = Σ_t δ_t x_tᵀ.

    Only a share of the rows of a gradient is kept, from the first on; the authors' sanitiser keeps 0.4.
    """
    rows = int(kept_share * factors[0].delta.shape[1])
    delta = np.concatenate([factor.delta[:, :rows] for factor in factors]).astype(np.float64)
    inputs = np.concatenate([factor.inputs for factor in factors]).astype(np.float64)
    lengths = [len(factor.delta) for factor in factors]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    by_example = []
    for start in range(0, len(delta), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        products = (delta[part] @ delta.T) * (inputs[part] @ inputs.T)
        by_example.append(np.add.reduceat(products, starts, axis=1))
    return np.asarray(np.add.reduceat(np.concatenate(by_example), starts, axis=0))


def clipped_gram(gram: roc.FloatArray, clipping_norm: float) -> roc.FloatArray:
    """Gram matrix of the same gradients, each scaled to a norm of at most `clipping_norm`."""
    norms = np.sqrt(np.clip(np.diag(gram), 0.0, None))
    factors = np.minimum(1.0, clipping_norm / np.maximum(norms, 1e-300))
    return np.asarray(gram * np.outer(factors, factors))


def simulated_inner_products(
    gram: roc.FloatArray,
    members: roc.BoolArray,
    noise: roc.FloatArray | float,
    generator: np.random.Generator,
) -> roc.FloatArray:
    """(R, N) inner products of simulated noisy sums with every candidate, exact in distribution.

    The noise is the standard deviation per coordinate of the sum, one or (R,).
    """
    values, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(np.clip(values, 0.0, None))
    draws = generator.standard_normal(members.shape) @ root.T
    return np.asarray(members @ gram + np.broadcast_to(noise, len(members))[:, None] * draws)


def correlation_scores(inner: roc.FloatArray, gram: roc.FloatArray) -> roc.FloatArray:
    """The weak attack: ⟨y, g_c⟩ / ‖g_c‖, (R, N)."""
    return np.asarray(inner / np.sqrt(np.maximum(np.diag(gram), 1e-300)))


def dictionary_scores(
    inner: roc.FloatArray, gram: roc.FloatArray, noise: float, rate: float
) -> roc.FloatArray:
    """Which candidates explain the release together: the best linear estimate of all memberships.

    Memberships have prior mean p and variance p(1-p), so with λ = s²/(p(1-p)) the estimate is
    p + (K + λI)⁻¹ (⟨y, g⟩ - p K 1): ridge regression on a dictionary of candidates. `inner` is the (R, N)
    ⟨y, g_c⟩, the noise s is per coordinate, the rate is p.
    """
    size = len(gram)
    ridge = noise**2 / (rate * (1.0 - rate)) + 1e-9 * float(np.trace(gram)) / size
    centred = inner - rate * gram.sum(axis=1)
    return np.asarray(rate + np.linalg.solve(gram + ridge * np.eye(size), centred.T).T)


def likelihood_ratio_scores(
    inner: roc.FloatArray, gram: roc.FloatArray, members: roc.BoolArray, noise: float
) -> roc.FloatArray:
    """Log likelihood ratio of every candidate by an adversary who knows all other members.

    The strongest adversary that differential privacy considers: no attack on this release does better. Of
    the (R, N) members only the others' part is used for a candidate. Without noise it is the share of the
    candidate's gradient in what the others leave unexplained.
    """
    squares = np.maximum(np.diag(gram), 1e-300)
    rest = members @ gram - members * squares
    shares = (inner - rest) / squares
    if noise == 0.0:
        return np.asarray(shares)
    return np.asarray((shares - 0.5) * squares / noise**2)
