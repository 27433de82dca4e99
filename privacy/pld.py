"""Privacy loss distributions of composed Gaussian events, by Google's dp-accounting.

Imported lazily by its users: dp-accounting brings scipy with it.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from dp_accounting.pld import privacy_loss_distribution

from fedmosaic.privacy.events import GaussianEvent

_COARSEST = 1e-4
_STEP_ERROR = 3e-3
_MAXIMUM_CELLS = 2**23


def discretization_interval(events: Sequence[GaussianEvent], largest_loss: float) -> float:
    """Grid of privacy losses that keeps the discretisation error of the composition small.

    The pessimistic rounding of one step widens its loss by up to the grid interval, and the widening
    of T steps grows with √T. With dp-accounting's fixed 1e-4, a million steps at σ = 5, q = 0.001 come
    out at ε = 0.750 where a fine grid gives 0.734.

    Args:
        events: the events to be composed.
        largest_loss: rough upper bound of the losses that matter, to bound memory.

    Returns:
        The interval, in units of privacy loss (nats).
    """
    steps = sum(event.steps for event in events)
    finest = 2.0 * (largest_loss + 1.0) / _MAXIMUM_CELLS
    return min(_COARSEST, max(finest, _STEP_ERROR / math.sqrt(max(1, steps))))


@lru_cache(maxsize=8)
def compose(events: tuple[GaussianEvent, ...], interval: float) -> Any:
    """Pessimistic privacy loss distribution of all events together, add/remove neighbours.

    Args:
        events: merged, every σ > 0, at least one.
        interval: grid interval from `discretization_interval`.

    Returns:
        A `dp_accounting` `PrivacyLossDistribution` (the package has no types).

    Reference:
        Doroshenko et al. 2022, "Connect the Dots: Tighter Discrete Approximations of Privacy Loss
        Distributions" (arXiv:2207.04380).
    """
    composed = None
    for event in events:
        if event.sampling_rate == 1.0:
            # T full-batch Gaussians are exactly one Gaussian with σ/√T.
            one = privacy_loss_distribution.from_gaussian_mechanism(
                standard_deviation=event.noise_multiplier / math.sqrt(event.steps),
                value_discretization_interval=interval,
            )
        else:
            one = privacy_loss_distribution.from_gaussian_mechanism(
                standard_deviation=event.noise_multiplier,
                sampling_prob=event.sampling_rate,
                value_discretization_interval=interval,
            ).self_compose(event.steps)
        composed = one if composed is None else composed.compose(one)
    return composed
