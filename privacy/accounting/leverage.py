"""What noise protects a member whose release is only ever seen in sums with others.

Members j add noise s_j (in clipping norms, per coordinate) to their own clipped sums, and only the rows of y
= H u are seen. An adversary who knows the noise of a coalition K has left, against member j,

    s_j / √ℓ_j(K),    ℓ_j(K) = s_j² h_jᵀ (Σ_{k ∉ K} s_k² h_k h_kᵀ)⁺ h_j ∈ (0, 1],

with h_j the j-th column of H: one example of j moves y by h_j Δᵀ with ‖Δ‖ ≤ C, and the unknown noise of y has
that covariance per coordinate. The leverage scores ℓ_j add up to the rank of H there. Sums of disjoint groups
with equal weights and noise, the ones that are made, have ℓ = 1 / (m − t) for m contributors, t of them in K.
"""

import math

from fedmosaic.protos.errors import AccountingError


def effective_noise_multiplier(noise: float, contributors: int, coalition: int) -> float:
    """Noise s·√(m − t) left to one of m contributors of a group sum against t who know or lack their own."""
    if not 0 <= coalition < contributors:
        raise AccountingError(f"{coalition} of {contributors} know their noise; at least one must be honest")
    return noise * math.sqrt(contributors - coalition)


def noise_share(noise_multiplier: float, minimum_contributors: int, colluders: int) -> float:
    """Noise s that each of at least m_min contributors adds so that any m_min − t of them add σ together."""
    return noise_multiplier / effective_noise_multiplier(1.0, minimum_contributors, colluders)
