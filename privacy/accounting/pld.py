"""Privacy loss distributions of composed Gaussian events, by Google's dp-accounting.

Imported lazily by its users: dp-accounting brings scipy with it.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from dp_accounting.pld import pld_pmf, privacy_loss_distribution, privacy_loss_mechanism

from fedmosaic.privacy.accounting.events import GaussianEvent

FloatArray = npt.NDArray[np.float64]

_COARSEST = 1e-4
_STEP_ERROR = 3e-3
_MAXIMUM_CELLS = 2**23
_PERSON_STEP_ERROR = 0.1
_PERSON_INTERVALS = (2e-4, 5e-3)


def discretization_interval(events: Sequence[GaussianEvent], largest_loss: float) -> float:
    """Grid of privacy losses, in nats, that keeps the discretisation error of the composition small.

    The pessimistic rounding of one step widens its loss by up to the grid interval, and the widening
    of T steps grows with √T. With dp-accounting's fixed 1e-4, a million steps at σ = 5, q = 0.001 come
    out at ε = 0.750 where a fine grid gives 0.734. `largest_loss` roughly bounds the losses that matter, and
    with them the memory.
    """
    steps = sum(event.steps for event in events)
    finest = 2.0 * (largest_loss + 1.0) / _MAXIMUM_CELLS
    return min(_COARSEST, max(finest, _STEP_ERROR / math.sqrt(max(1, steps))))


@functools.lru_cache(maxsize=8)
def compose(events: tuple[GaussianEvent, ...], interval: float) -> Any:
    """Pessimistic privacy loss distribution of merged events together, every σ > 0, add/remove neighbours.

    A `dp_accounting` `PrivacyLossDistribution` (the package has no types), on a grid from
    `discretization_interval`.

    Reference:
        Doroshenko et al. 2022, "Connect the Dots: Tighter Discrete Approximations of Privacy Loss
        Distributions" (arXiv:2207.04380).
    """
    return _composed(_one_event(event, interval) for event in events)


@functools.lru_cache(maxsize=16)
def compose_for_person(events: tuple[GaussianEvent, ...], examples: int) -> Any:
    """The same for somebody with k ≥ 1 examples, all of them added or removed.

    The examples of one person that are in a Poisson sample are Binomial(k, q) many, and j of them move the
    clipped sum by at most j clipping norms, whatever their directions: a mixture of Gaussians with
    sensitivities 0 … k. Without sampling all k are in it: one Gaussian with sensitivity k.

    Reference:
        Ganesh 2024, "Tight Group-Level DP Guarantees for DP-SGD with Sampling via Mixture of Gaussians
        Mechanisms" (arXiv:2401.10294).
    """
    steps = sum(event.steps for event in events)
    least, most = _PERSON_INTERVALS
    # A coarser grid than `discretization_interval` asks for costs 0.01 in ε, of which there are many here.
    interval = min(most, max(least, _PERSON_STEP_ERROR / math.sqrt(steps)))
    return _composed(_for_person(event, examples, interval) for event in events)


def deltas(distribution: Any, epsilons: FloatArray) -> FloatArray:
    """δ at ascending ε of a composed distribution, the larger of both neighbour directions.

    What `get_delta_for_epsilon` sums in a loop over the grid, in the same order, as running sums.
    """
    # The package hands its probabilities out in no other way.
    sides = [distribution._pmf_remove] + ([] if distribution._symmetric else [distribution._pmf_add])
    return np.asarray(np.max([_side_deltas(side.to_dense_pmf(), epsilons) for side in sides], axis=0))


def _side_deltas(pmf: Any, epsilons: FloatArray) -> FloatArray:
    losses = (np.arange(pmf.size) + pmf._lower_loss) * pmf._discretization
    falling = pmf._probs[::-1]
    upper = np.cumsum(np.concatenate([[pmf._infinity_mass], falling]))
    lower = np.cumsum(np.concatenate([[0.0], falling * np.exp(-losses[::-1])]))
    above = pmf.size - np.searchsorted(losses, epsilons, side="right")
    return np.asarray(upper[above] - np.exp(epsilons) * lower[above])


def _composed(parts: Iterable[Any]) -> Any:
    return functools.reduce(lambda one, other: one.compose(other), parts)


def _full_batch(event: GaussianEvent, examples: int, interval: float) -> Any:
    # T full-batch Gaussians are exactly one Gaussian with σ/√T.
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=event.noise_multiplier / math.sqrt(event.steps),
        sensitivity=float(examples),
        value_discretization_interval=interval,
    )


@functools.lru_cache(maxsize=16)
def _one_event(event: GaussianEvent, interval: float) -> Any:
    if event.sampling_rate == 1.0:
        return _full_batch(event, 1, interval)
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=event.noise_multiplier,
        sampling_prob=event.sampling_rate,
        value_discretization_interval=interval,
    ).self_compose(event.steps)


@functools.lru_cache(maxsize=32)
def _for_person(event: GaussianEvent, examples: int, interval: float) -> Any:
    if event.sampling_rate == 1.0:
        return _full_batch(event, examples, interval)
    rate = event.sampling_rate
    shares = [
        math.comb(examples, count) * rate**count * (1.0 - rate) ** (examples - count)
        for count in range(examples + 1)
    ]
    neighbours = privacy_loss_mechanism.AdjacencyType
    sides = [
        _mixture_side(event.noise_multiplier, shares, interval, side)
        for side in (neighbours.REMOVE, neighbours.ADD)
    ]
    return privacy_loss_distribution.PrivacyLossDistribution(*sides).self_compose(event.steps)


def _mixture_side(sigma: float, shares: Sequence[float], interval: float, side: Any) -> Any:
    """`from_mixture_gaussian_mechanism` in one direction, with a faster search and the same values."""
    loss = _MixtureLoss(sigma, [float(count) for count in range(len(shares))], shares, adjacency_type=side)
    bounds = loss.connect_dots_bounds()
    low, high = math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval)
    found = loss.get_delta_for_epsilon(np.arange(low, high + 1) * interval)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, found)


class _MixtureLoss(privacy_loss_mechanism.MixtureGaussianPrivacyLoss):  # type: ignore[misc]  # no types
    """The package searches for each loss by recursion in Python; here the same halvings, all at once."""

    def _inverse_privacy_losses_with_range(
        self, privacy_losses: FloatArray, bounds: tuple[float, float], precision: float = 1e-6
    ) -> FloatArray:
        low, high = (np.full(len(privacy_losses), bound) for bound in bounds)
        # Losses ascend, so those that are still searched for in one interval stand together.
        while (open_ := np.flatnonzero(high - low > precision)).size:
            middle = (low[open_] + high[open_]) / 2
            new = np.concatenate([[True], middle[1:] != middle[:-1]])
            at_middle = self._losses(middle[new])[np.cumsum(new) - 1]
            right = privacy_losses[open_] < at_middle
            low[open_[right]], high[open_[~right]] = middle[right], middle[~right]
        return np.asarray(np.floor(high / precision) * precision)

    def _losses(self, points: FloatArray) -> FloatArray:
        sign = 1.0 if self.adjacency_type == privacy_loss_mechanism.AdjacencyType.ADD else -1.0
        shifted = np.multiply.outer(points, self.sensitivities) / self._variance
        summands = self._precompute_privacy_loss_constants + sign * shifted
        return np.asarray(-sign * np.logaddexp.reduce(summands, axis=1))
