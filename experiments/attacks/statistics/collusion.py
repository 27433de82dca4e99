"""Colluding recipients: their aggregates are linear equations in the adapters of the others.

A recipient i receives in round t the sum G_it = Σ_j w_itj L_jt. A coalition knows its own adapters and all
weights, takes its own parts off, and solves for the rest. While adapters hardly move between rounds, every
round adds equations in the same unknowns; the movement is the error of the solution.

Shape legend: E equations, N members, U members outside the coalition, D numbers of an adapter.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmosaic.privacy.coalitions import SOLVED, estimate_errors

FloatArray = npt.NDArray[np.float64]

_RIDGE = 1e-9


@dataclass(frozen=True, eq=False)
class Equations:
    """What a coalition holds: weights of the others, aggregates less its own parts, and rounds from 0."""

    weights_EU: FloatArray
    right_ED: FloatArray
    rounds_E: npt.NDArray[np.int64]


def independent_equations(weights_EU: FloatArray) -> int:
    """Number of linearly independent equations, as far as weights of so many bits can tell."""
    values = np.linalg.svd(weights_EU, compute_uv=False)
    return int(np.count_nonzero(values > 1e-6 * values.max(initial=0.0)))


def equations(
    weights_RNN: Sequence[FloatArray], adapters_RND: Sequence[FloatArray], coalition: Sequence[int]
) -> Equations:
    """The equations of a coalition; a row of zeros (nothing received) is none.

    Per round, row i of the weights is what member i received, and the adapters are as they were uploaded.
    """
    members = len(weights_RNN[0])
    others = [index for index in range(members) if index not in set(coalition)]
    rows, right, rounds = [], [], []
    for number, (weights_NN, adapters_ND) in enumerate(zip(weights_RNN, adapters_RND, strict=True)):
        for index in coalition:
            row = weights_NN[index]
            if row.any():
                rows.append(row[others])
                # The aggregate less the coalition's own parts is the sum over the others.
                right.append(row[others] @ adapters_ND[others])
                rounds.append(number)
    width = len(adapters_RND[0][0])
    return Equations(
        np.array(rows).reshape(len(rows), len(others)),
        np.array(right).reshape(len(rows), width),
        np.array(rounds, dtype=np.int64),
    )


def smallest_coalition(weights_RNN: Sequence[FloatArray]) -> int | None:
    """Size of the smallest coalition whose rows solve for an adapter that stands still, None if none does.

    Tries every one of the 2^N coalitions, so it is for small federations.
    """
    members = len(weights_RNN[0])
    for size in range(1, members):
        for coalition in itertools.combinations(range(members), size):
            others = [index for index in range(members) if index not in coalition]
            rows = np.concatenate([weights_NN[np.ix_(coalition, others)] for weights_NN in weights_RNN])
            if estimate_errors(rows).min() < SOLVED:
                return size
    return None


def solve(held: Equations, movement: float = 0.0) -> FloatArray:
    """(U, D): the coalition's best linear estimate of the others' adapters in the first round.

    Adapters are taken for independent, of unit variance, and for random walks over the rounds, so that the
    error of equation e of round t has the covariance min(t, t') m² ⟨w_e, w_e'⟩ with that of e' in round t'. m
    is the movement: standard deviation of a round's movement over that of an adapter.
    """
    weights, rounds = held.weights_EU, held.rounds_E
    products = weights @ weights.T
    moved = movement**2 * np.minimum(rounds[:, None], rounds[None, :]) * products
    system = products + moved + _RIDGE * np.eye(len(weights))
    return np.asarray(weights.T @ np.linalg.solve(system, held.right_ED))


def recovery_error(estimate_D: FloatArray, truth_D: FloatArray) -> float:
    """Relative error ‖estimate - truth‖ / ‖truth‖; 1 is what an estimate of zero has."""
    return float(np.linalg.norm(estimate_D - truth_D)) / max(float(np.linalg.norm(truth_D)), 1e-300)
