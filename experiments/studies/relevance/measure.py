"""Measure how well noisy profiles tell clients of one task from the others.

Shape legend: C clients, K coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import sem

from fedmosaic.experiments.scenario.metrics import area_under_curve
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import Float64Array, IntArray, SeededTestNoise
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, release
from fedmosaic.server.round.relevance import corrected_cosine

CLIENTS_PER_TASK = 2


@dataclass(frozen=True)
class Recovery:
    """How clients of one task found each other, by the corrected cosine, averaged over trials.

    Attributes:
        auc: area under the ROC curve of same-task pairs against all others.
        auc_error: standard error of that average.
        top1: share of clients whose most similar peer has the same task.
        bootstrapped: whether n exceeded a client's examples, so that they were drawn with replacement.
    """

    auc: float
    auc_error: float
    top1: float
    bootstrapped: bool


def measure(
    units_by_task: Sequence[IntArray], mechanisms: Sequence[ProfileMechanism], n: int, trials: int, seed: int
) -> list[Recovery]:
    """Release profiles of n examples for two clients per task, and compare them; one result per mechanism.

    Args:
        units_by_task: per task the clipped rows of its examples, as `clip` gives them; a task's two clients
            hold its even and its odd rows.
        mechanisms: the same mechanism with the noise multipliers to compare.
        n: examples per release.
        trials: repetitions.
        seed: of subsets and noise.
    """
    pools = [units[half::CLIENTS_PER_TASK] for units in units_by_task for half in range(CLIENTS_PER_TASK)]
    labels_C = np.arange(len(pools)) // CLIENTS_PER_TASK
    bootstrapped = any(n > len(pool) for pool in pools)
    generator = np.random.default_rng([seed, n])
    noise = SeededTestNoise(int(generator.integers(2**63)))
    trials_of: list[list[tuple[float, float]]] = [[] for _ in mechanisms]
    for _ in range(trials):
        sums = [
            pool[generator.choice(len(pool), n, replace=n > len(pool))].sum(axis=0, dtype=np.int64)
            for pool in pools
        ]
        for found, mechanism in zip(trials_of, mechanisms, strict=True):
            released = [release(ClippedSum(total, 0, 0, n), mechanism, noise) for total in sums]
            found.append(_figures(np.array(released, dtype=np.float64), mechanism.noise_variance, labels_C))
    recoveries = []
    for found in trials_of:
        areas, tops = np.array(found).T
        error = float(sem(areas)) if trials > 1 else 0.0
        recoveries.append(Recovery(float(areas.mean()), error, float(tops.mean()), bootstrapped))
    return recoveries


def top_match(similarity: Float64Array, labels: npt.NDArray[np.int64]) -> float:
    """Share of rows whose largest entry off the diagonal belongs to the row's own label."""
    without_self = similarity.copy()
    np.fill_diagonal(without_self, -np.inf)
    return float(np.mean(labels[without_self.argmax(axis=1)] == labels))


def _figures(
    vectors_CK: Float64Array, variance: float, labels_C: npt.NDArray[np.int64]
) -> tuple[float, float]:
    similarity = corrected_cosine(vectors_CK, np.full(len(vectors_CK), variance)).similarity
    rows, columns = np.triu_indices(len(vectors_CK), 1)
    same, pairs = labels_C[rows] == labels_C[columns], similarity[rows, columns]
    return area_under_curve(pairs[same], pairs[~same]), top_match(similarity, labels_C)
