"""Likelihood ratio of a membership statistic, calibrated for every candidate on shadow runs.

The attacker trains R shadow runs with random halves of a pool of candidates, and learns for every candidate
how its statistic is distributed with and without it. A statistic alone confuses members with easy texts;
the calibrated one does not. Every run is attacked with the others as its shadows, so nothing of a run but
its own release enters its scores.

With few runs the variance of one candidate's statistic is poorly known, so it is taken over all candidates.

Shape legend: R runs, N candidates.

Reference:
    Carlini et al. 2022, "Membership inference attacks from first principles", sections V and VI.
"""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

LEAST_RUNS = 8
"""Fewest runs for which means of both kinds can be told."""


def calibrated_scores(statistics: FloatArray, members: BoolArray) -> FloatArray:
    """Log likelihood ratio of membership of every candidate in every run, its own run left out.

    Args:
        statistics: (R, N) finite, of any scale.
        members: (R, N) who was in which run; of a run's own row, nothing enters its scores.

    Returns:
        (R, N); 0 where no other run has, or none lacks, the candidate.

    Raises:
        ValueError: there are too few runs, or a statistic is not finite.
    """
    if len(statistics) < LEAST_RUNS or not np.isfinite(statistics).all():
        raise ValueError(
            f"at least {LEAST_RUNS} runs with finite statistics are needed, got {len(statistics)}"
        )
    scores = np.empty_like(statistics)
    for run in range(len(statistics)):
        others = np.arange(len(statistics)) != run
        scores[run] = _log_ratio(statistics[run], statistics[others], members[others])
    return scores


def _log_ratio(observed: FloatArray, shadows: FloatArray, members: BoolArray) -> FloatArray:
    inside, spread_inside = _fit(shadows, members)
    outside, spread_outside = _fit(shadows, ~members)
    ratio = _log_density(observed, inside, spread_inside) - _log_density(observed, outside, spread_outside)
    return np.where(np.isnan(ratio), 0.0, ratio)


def _fit(shadows: FloatArray, chosen: BoolArray) -> tuple[FloatArray, float]:
    """Means per candidate, NaN where there is none, and one standard deviation for all candidates."""
    counts = chosen.sum(axis=0)
    with np.errstate(invalid="ignore"):
        means = np.where(counts > 0, (shadows * chosen).sum(axis=0) / np.maximum(counts, 1), np.nan)
    known = counts > 0
    squares = float(np.sum(np.where(chosen[:, known], (shadows - np.nan_to_num(means))[:, known] ** 2, 0.0)))
    freedom = int(counts[known].sum() - known.sum())
    return means, float(np.sqrt(squares / max(1, freedom))) or 1e-12


def _log_density(values: FloatArray, means: FloatArray, spread: float) -> FloatArray:
    return np.asarray(-0.5 * ((values - means) / spread) ** 2 - np.log(spread))
