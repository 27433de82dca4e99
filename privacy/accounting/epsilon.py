"""ε of composed Gaussian releases, by three accountants that bound the same quantity and check each other.

* "prv": numerical composition of privacy random variables (Opacus), an upper bound that lies its
  numerical error of 0.01 above the truth; the default. No ε below 0.01 can come from it.
* "rdp": Rényi differential privacy (Opacus) with extended orders; looser, never fails; the fallback.
* "pld": privacy loss distributions (Google dp-accounting).

Opacus's "gdp" is refused: it is a central-limit approximation, not a bound. torch and opacus are imported
when an ε is first asked for.
"""

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedmosaic.privacy.accounting.events import GaussianEvent, merge_events
from fedmosaic.protos.errors import AccountingError

logger = logging.getLogger(__name__)

ACCOUNTANTS = ("prv", "rdp", "pld")
LARGEST_TIGHT_EPSILON = 100.0
"""Above this no tight value is computed: PRV and PLD need minutes, and nothing is promised anyway."""
SMALLEST_NOISE_MULTIPLIER = 0.01
"""Below this a release counts as unprotected: its ε is in the thousands."""
SMALLEST_DELTA = 1e-12
"""Below this the tight accountants' own numerical errors dominate."""

_LARGEST_NOISE_MULTIPLIER = 1e6
_SMALLEST_SAMPLING_RATE = 1e-7
_LARGEST_PRV_DOMAIN = 2**24
_PRV_EPSILON_ERROR = 0.01
_RDP_TOLERANCE = 1e-3
_REFINEMENTS = 2

# Opacus evaluates subsampled orders through binomial coefficients, which overflow above 1,029; the
# pure Gaussian has a closed form at every order. The default orders stop at 63 and with it ε at 0.10.
_SUBSAMPLED_ORDERS = [
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *range(11, 64),
    *(round(64 * 2 ** (step / 8)) for step in range(33)),
]
_GAUSSIAN_ORDERS = [*_SUBSAMPLED_ORDERS, *(round(1024 * 2 ** (step / 4)) for step in range(1, 17))]


@dataclass(frozen=True, slots=True)
class EpsilonBound:
    """An ε and the accountant that it comes from."""

    epsilon: float
    accountant: str


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """The same composition by three accountants, after `check_order` found them consistent."""

    prv: float
    rdp: float
    pld: float


def epsilon(events: Iterable[GaussianEvent], delta: float, accountant: str = "prv") -> float:
    """ε ≥ 0 at δ of all events together, add/remove neighbours; ∞ when a step has no noise (σ below 0.01).

    Events of several channels go into one call: their joint ε is smaller than the sum of each channel's.
    Interleaved and adaptively chosen inputs are covered as long as every (σ, q, steps) was fixed in advance
    (Haney et al. 2023, arXiv:2309.05901). AccountingError if an argument is outside its domain, or the
    accountant is refused or cannot evaluate these events (`epsilon_bound` then falls back to RDP).

    Reference:
        Gopi, Lee and Wutschitz 2021 (arXiv:2106.02848) for "prv"; Mironov 2017 and Balle et al. 2020
        (arXiv:1905.09982, theorem 21) for "rdp"; Doroshenko et al. 2022 for "pld".
    """
    _check_accountant(accountant)
    _check_delta_domain(delta)
    merged = merge_events(events)
    if not merged:
        return 0.0
    if any(event.noise_multiplier < SMALLEST_NOISE_MULTIPLIER for event in merged):
        return math.inf
    return _evaluate(merge_events(_toward_more_loss(event) for event in merged), float(delta), accountant)


def epsilon_bound(events: Iterable[GaussianEvent], delta: float, accountant: str = "prv") -> EpsilonBound:
    """`epsilon`, or the RDP bound, named as such, where the accountant cannot evaluate the events."""
    events = tuple(events)
    _check_accountant(accountant)
    _check_delta_domain(delta)
    try:
        return EpsilonBound(epsilon(events, delta, accountant), accountant)
    except AccountingError as error:
        if accountant == "rdp":
            raise
        logger.warning("falling back from %s to the looser RDP bound: %s", accountant, error)
        return EpsilonBound(epsilon(events, delta, "rdp"), "rdp")


def cross_checked_epsilon(events: Iterable[GaussianEvent], delta: float) -> CrossCheck:
    """ε by all three accountants, AccountingError when they contradict each other; PRV is the one to report.

    PRV is the truth within its error plus that error; PLD is the truth plus a rounding that shrinks with its
    grid. So PRV below PLD means either a wrong PRV or a coarse PLD: the grid is refined before the figures
    are refused.
    """
    events = merge_events(events)
    prv, rdp, pld = (epsilon(events, delta, name) for name in ("prv", "rdp", "pld"))
    for refinement in range(1, _REFINEMENTS + 1):
        if prv >= pld or not math.isfinite(pld):
            break
        pld = _pld(tuple(_toward_more_loss(event) for event in events), delta, finer=4**refinement)
    return check_order(prv, rdp, pld)


def person_epsilon(events: Iterable[GaussianEvent], delta: float, examples: int) -> float:
    """ε at δ of all events for somebody with k ≥ 1 examples: all of them added or removed at once.

    Every example of the person may have taken part in each event. An upper bound by PLD
    (`pld.compose_for_person`); ∞ when a step has no noise, or above the ε up to which tight values are
    computed for one example.
    """
    _check_delta_domain(delta)
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise AccountingError(f"a person has {examples!r} examples; give a whole number of at least 1")
    merged = merge_events(events)
    if not merged:
        return 0.0
    if any(event.noise_multiplier < SMALLEST_NOISE_MULTIPLIER * examples for event in merged):
        return math.inf
    merged = merge_events(_toward_more_loss(event) for event in merged)
    if epsilon(merged, delta, "rdp") > LARGEST_TIGHT_EPSILON or delta < SMALLEST_DELTA:
        return math.inf
    return _person_epsilon(merged, float(delta), examples)


@lru_cache(maxsize=4096)
def _person_epsilon(events: tuple[GaussianEvent, ...], delta: float, examples: int) -> float:
    from fedmosaic.privacy.accounting import pld

    return float(pld.compose_for_person(events, examples).get_epsilon_for_delta(delta))


def check_order(prv: float, rdp: float, pld: float) -> CrossCheck:
    """Refuse figures that cannot all be upper bounds of one ε, of which PLD's is the reference.

    PRV's margin of 0.01 keeps it above PLD; rounding may lift PLD up to 0.001 above a tight RDP.
    """
    if any(math.isnan(value) or value < 0 for value in (prv, rdp, pld)):
        raise AccountingError(f"an accountant failed: PRV {prv}, RDP {rdp}, PLD {pld}; report this as a bug")
    for name, value, margin in (("PRV", prv, 0.0), ("RDP", rdp, _RDP_TOLERANCE)):
        if value < pld - margin:
            raise AccountingError(
                f"{name} gives ε = {value:.4f}, below PLD's {pld:.4f}: one of the two is not an upper bound, "
                "so neither is reported; report this as a bug with the ledger's (σ, q, steps)"
            )
    return CrossCheck(prv=prv, rdp=rdp, pld=pld)


def default_delta(examples: int, largest: float | None = None) -> float:
    """The smaller of n^-1.1, which is below 1/n for all numbers n ≥ 2 of examples, and the terms' bound."""
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 2:
        raise AccountingError("δ = n^-1.1 needs at least 2 examples; a smaller data set cannot be protected")
    return min(float(examples**-1.1), 1.0 if largest is None else largest)


def check_delta(delta: float, examples: int) -> None:
    """Refuse a δ above 1/n, at which a random one of n examples may be published; the message hides n."""
    _check_delta_domain(delta)
    if delta * examples > 1.0:
        raise AccountingError(
            f"δ = {delta:g} is above 1/n for this client's number of examples n; at such a δ a mechanism "
            "that publishes one example would count as private. Use the default δ = n^-1.1 or a smaller value"
        )


def _check_accountant(accountant: str) -> None:
    if accountant == "gdp":
        raise AccountingError(
            "accountant 'gdp' is refused: Opacus's Gaussian-DP accountant is a central-limit approximation, "
            "not a bound, and reported up to 13 times less than the true ε under subsampling; use 'prv'"
        )
    if accountant not in ACCOUNTANTS:
        raise AccountingError(f"unknown accountant {accountant!r}; use one of {', '.join(ACCOUNTANTS)}")


def _check_delta_domain(delta: float) -> None:
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0.0 < delta < 1.0:
        raise AccountingError(f"δ is {delta!r}; it must lie strictly between 0 and 1, and below 1/n")


def _toward_more_loss(event: GaussianEvent) -> GaussianEvent:
    # ε falls with σ and grows with q, so both clamps only raise the bound; beyond them the
    # accountants' floating point is not to be trusted.
    return GaussianEvent(
        min(event.noise_multiplier, _LARGEST_NOISE_MULTIPLIER),
        max(event.sampling_rate, _SMALLEST_SAMPLING_RATE),
        event.steps,
    )


@lru_cache(maxsize=4096)
def _evaluate(events: tuple[GaussianEvent, ...], delta: float, accountant: str) -> float:
    rdp = _rdp(events, delta, extended=True)
    if accountant == "rdp":
        return rdp
    if rdp > LARGEST_TIGHT_EPSILON:
        raise AccountingError(
            f"ε is bounded by {rdp:.0f} (RDP), above the {LARGEST_TIGHT_EPSILON:.0f} up to which "
            f"{accountant} is evaluated; nothing is promised at such values: add noise, or take fewer steps"
        )
    if delta < SMALLEST_DELTA:
        raise AccountingError(
            f"δ = {delta:g} is below {SMALLEST_DELTA:g}, where {accountant}'s numerical errors dominate; "
            "a larger δ (fewer examples per client) can be accounted for"
        )
    value = _prv(events, delta) if accountant == "prv" else _pld(events, delta)
    if math.isnan(value):
        raise AccountingError(f"{accountant} returned no number for {events}; take fewer steps or more noise")
    return value


def _rdp(events: tuple[GaussianEvent, ...], delta: float, *, extended: bool) -> float:
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis import rdp as analysis

    pure = all(event.sampling_rate == 1.0 for event in events)
    extra = tuple(_GAUSSIAN_ORDERS if pure else _SUBSAMPLED_ORDERS)
    orders = extra if extended else tuple(RDPAccountant.DEFAULT_ALPHAS)
    total = sum(_rdp_of_step(e.noise_multiplier, e.sampling_rate, orders) * e.steps for e in events)
    with warnings.catch_warnings():
        # "Optimal order is the largest alpha": the bound holds, it is only not the tightest.
        warnings.simplefilter("ignore")
        value = float(analysis.get_privacy_spent(orders=orders, rdp=total, delta=delta)[0])
    if math.isnan(value):
        raise AccountingError(f"RDP returned no number for {events}; check σ, q and steps")
    return max(0.0, value)


@lru_cache(maxsize=1024)
def _rdp_of_step(sigma: float, rate: float, orders: tuple[float, ...]) -> Any:
    """Rényi divergences of one step at these orders; those of T steps are T times as large."""
    from opacus.accountants.analysis import rdp as analysis

    return analysis.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=orders)


def _prv_cells(events: tuple[GaussianEvent, ...], delta: float) -> float:
    """Size of the grid on which PRV would compose these events; the formula is Opacus's own."""
    delta_error = delta / 1000
    steps = sum(event.steps for event in events)
    mesh = _PRV_EPSILON_ERROR / math.sqrt(steps * math.log(12 / delta_error) / 2)
    return 2 * (_rdp(events, delta_error / 4, extended=False) + 3) / mesh


def within_resolution(events: Sequence[GaussianEvent], delta: float) -> bool:
    """Whether the tight accountant can evaluate these events, without evaluating them."""
    return delta >= SMALLEST_DELTA and _prv_cells(tuple(events), delta) <= _LARGEST_PRV_DOMAIN


def _prv(events: tuple[GaussianEvent, ...], delta: float) -> float:
    import numpy as np
    from opacus.accountants import PRVAccountant

    if (cells := _prv_cells(events, delta)) > _LARGEST_PRV_DOMAIN:
        raise AccountingError(
            f"PRV would need a grid of {cells:.1e} cells for {sum(event.steps for event in events)} steps, "
            f"more than {_LARGEST_PRV_DOMAIN:.1e}; take fewer steps (schedule.rounds times "
            "adapter_privacy.steps_per_round), or more noise"
        )
    accountant = PRVAccountant()
    accountant.history = [(event.noise_multiplier, event.sampling_rate, event.steps) for event in events]
    try:
        # q = 1 takes log(0) on purpose; the branch is discarded by numpy.where. The second is as for RDP.
        with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = accountant.get_epsilon(delta, eps_error=_PRV_EPSILON_ERROR, delta_error=delta / 1000)
    except (RuntimeError, ValueError, OverflowError, MemoryError) as error:
        raise AccountingError(
            f"PRV cannot evaluate {events}: {error}; use fewer steps or more noise"
        ) from error
    return max(float(value), 0.0)  # in this order NaN stays, and is refused


def _pld(events: tuple[GaussianEvent, ...], delta: float, *, finer: int = 1) -> float:
    from fedmosaic.privacy.accounting import pld

    interval = pld.discretization_interval(events, _rdp(events, delta, extended=True))
    return float(pld.compose(events, interval / finer).get_epsilon_for_delta(delta))
