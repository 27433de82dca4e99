"""From a budget to noise: which σ a channel needs beside what is settled."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from fedmosaic.privacy.accounting.epsilon import LARGEST_TIGHT_EPSILON, epsilon, within_resolution
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.protos.errors import AccountingError

_RELATIVE_PRECISION = 1e-3
_LARGEST_FACTOR = 1e6
_SMALLEST_FACTOR = 1e-2
_MOST_TIGHT_STEPS = 100_000


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    fixed_events: Sequence[GaussianEvent],
    sampling_rate: float,
    steps: int,
) -> float:
    """Smallest σ (to 0.1 %) with which `steps` releases at rate q fit beside the fixed events.

    AccountingError if an argument is outside its domain (target ε in (0, 100]), the fixed events alone reach
    the target, or no noise suffices (PRV cannot certify anything below ε = 0.01).
    """
    if steps < 1:
        raise AccountingError(f"steps is {steps}; plan at least one release")
    planned = GaussianEvent(1.0, sampling_rate, steps)
    return noise_factor_for(target_epsilon, delta, fixed_events, [planned])


def check_plannable(
    target_epsilon: float,
    delta: float,
    fixed_events: Sequence[GaussianEvent],
    sampling_rate: float,
    steps: int,
) -> None:
    """Refuse what `noise_multiplier_for` cannot plan, with its errors; in milliseconds where it could.

    RDP bounds ε from above: a σ that suffices by it suffices by PRV, if PRV can evaluate it.
    """
    sigma = 1.0
    while sigma <= _LARGEST_FACTOR:
        events = [*fixed_events, GaussianEvent(sigma, sampling_rate, steps)]
        if epsilon(events, delta, "rdp") <= target_epsilon:
            if within_resolution(events, delta):
                return
            break
        sigma *= 2.0
    else:
        # RDP's own floor lies above the target; with next to no adapter the tight accountant decides.
        if epsilon(fixed_events, delta) < target_epsilon and epsilon(events, delta) <= target_epsilon:
            return
    noise_multiplier_for(target_epsilon, delta, fixed_events, sampling_rate, steps)


def noise_factor_for(
    target_epsilon: float,
    delta: float,
    fixed_events: Sequence[GaussianEvent],
    scaled_events: Sequence[GaussianEvent],
) -> float:
    """Factor on every σ of `scaled_events` with which everything together costs the target ε.

    To 0.1 %, evaluated and found to give ε ≤ target_epsilon; below 1 when the releases had more noise than
    the target asks for. AccountingError as for `noise_multiplier_for`, or with nothing to scale.
    """
    scaled = [event for event in scaled_events if event.steps]
    if not scaled or any(event.noise_multiplier == 0 for event in scaled):
        raise AccountingError("there is no noise to scale; give releases with σ > 0 and at least one step")

    def events_at(factor: float) -> list[GaussianEvent]:
        louder = (replace(event, noise_multiplier=event.noise_multiplier * factor) for event in scaled)
        return [*fixed_events, *louder]

    # Where a tight value takes minutes, or cannot be had, the looser bound plans a little more noise. The
    # ledger, too, goes on with it then (`fedmosaic.privacy.accounting.epsilon.epsilon_bound`).
    if sum(event.steps for event in events_at(1.0)) <= _MOST_TIGHT_STEPS:
        with suppress(_NoTightBoundError):
            return _search(target_epsilon, delta, fixed_events, events_at, "prv")
    return _search(target_epsilon, delta, fixed_events, events_at, "rdp")


class _NoTightBoundError(AccountingError):
    """The accountant cannot evaluate these releases, for example because there are too many steps."""


def _search(
    target: float,
    delta: float,
    fixed: Sequence[GaussianEvent],
    events_at: Callable[[float], list[GaussianEvent]],
    accountant: str,
) -> float:
    if not 0.0 < target <= LARGEST_TIGHT_EPSILON:
        raise AccountingError(
            f"target ε is {target}; it must be in (0, {LARGEST_TIGHT_EPSILON:.0f}], "
            "and below about 10 to mean anything"
        )
    spent = _epsilon_or_more(list(fixed), delta, accountant, target)
    if spent >= target:
        raise AccountingError(
            f"the settled releases alone cost ε = {spent:.3f} of a target of {target:g}; raise their noise, "
            "take fewer of them, or raise the target"
        )
    room = target - spent

    def excess(factor: float) -> float:
        return _epsilon_or_more(events_at(factor), delta, accountant, target) - target

    low, high = _bracket(excess)
    if high > _LARGEST_FACTOR:
        raise AccountingError(
            f"no noise brings these releases to ε ≤ {target:g}: the accountant's own resolution is 0.01, and "
            f"the settled releases cost {spent:.3f}; raise the target or take fewer steps"
        )
    over, under = excess(low), excess(high)
    while high - low > _RELATIVE_PRECISION * high and -under > _RELATIVE_PRECISION * room:
        middle = _between(low, high, over, under)
        value = excess(middle)
        if value <= 0.0:
            high, under = middle, value
        else:
            low, over = middle, value
    return high


def _bracket(excess: Callable[[float], float]) -> tuple[float, float]:
    high = 1.0
    while excess(high) > 0.0 and high <= _LARGEST_FACTOR:
        high *= 2.0
    low = high / 2.0
    while low > _SMALLEST_FACTOR and excess(low) <= 0.0:
        low, high = low / 2.0, low
    return low, high


def _between(low: float, high: float, over: float, under: float) -> float:
    # ε falls roughly like a power of σ, so a straight line between the ends aims well; kept off the
    # ends, it shrinks the bracket from both sides even where ε is flat.
    share = over / (over - under) if math.isfinite(over) else 0.5
    return low + (high - low) * min(0.95, max(0.05, share + 0.01))


def _epsilon_or_more(events: list[GaussianEvent], delta: float, accountant: str, target: float) -> float:
    """ε; where the accountant cannot say it and RDP's bound is above the target anyway, that bound."""
    # RDP first: it decides far-off σ in milliseconds, and there the tight accountants refuse.
    rdp = epsilon(events, delta, "rdp")
    if rdp > LARGEST_TIGHT_EPSILON:
        return math.inf
    try:
        return epsilon(events, delta, accountant)
    except AccountingError as error:
        if rdp > target:
            # The search goes on among larger σ, and settles on none whose ε was not evaluated.
            return rdp
        raise _NoTightBoundError(str(error)) from error
