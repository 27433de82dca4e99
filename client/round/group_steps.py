"""The shared branch as a function of the groups' noisy sums alone, so post-processing of them.

Every recipient takes the same public steps from the same public start: Adam with a learning rate that falls
to zero over the planned steps. There is no optimizer state to keep or to lose: a member that comes back, or
one that joins, computes the branch anew from the sums.

Reference: Kingma and Ba, "Adam", ICLR 2015, algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_BETA_1, _BETA_2, _TINY = 0.9, 0.95, 1e-8


@dataclass(frozen=True)
class GroupSum:
    """One round's sum (D,) float64 of one group, in the unit of the gradients, public to the members.

    The divisor is the expected number of examples behind it: contributors times expected batch size.
    """

    vector: FloatArray
    divisor: float


def mixed_gradient(sums: Sequence[GroupSum | None], mixing: Sequence[float]) -> FloatArray | None:
    """A recipient's own mix (D,) of one round's group means: Σ_r M_r y_r / n_r over groups that formed a sum.

    The weights are not negative. None if no group that counts formed a sum: no step is taken then.
    """
    formed = [(total, weight) for total, weight in zip(sums, mixing, strict=True) if total and weight > 0.0]
    whole = sum(weight for _, weight in formed)
    if not formed:
        return None
    mixed = np.zeros_like(formed[0][0].vector)
    for total, weight in formed:
        mixed += (weight / whole / total.divisor) * total.vector
    return mixed


def shared_branch(
    start: FloatArray, gradients: Sequence[FloatArray | None], learning_rate: float, planned_steps: int
) -> FloatArray:
    """The shared branch (D,) float64 after the rounds so far, whose `gradients` `mixed_gradient` gave.

    It starts from public values; the learning rate falls linearly to 0 over the planned steps of the whole
    run.
    """
    theta, first, second = start.astype(np.float64), np.zeros_like(start), np.zeros_like(start)
    taken = 0
    for number, gradient in enumerate(gradients):
        if gradient is None:
            continue
        taken += 1
        first = _BETA_1 * first + (1.0 - _BETA_1) * gradient
        second = _BETA_2 * second + (1.0 - _BETA_2) * gradient**2
        mean = first / (1.0 - _BETA_1**taken)
        scale = np.sqrt(second / (1.0 - _BETA_2**taken)) + _TINY
        theta = theta - learning_rate * max(0.0, 1.0 - number / planned_steps) * mean / scale
    return theta
