"""What a release spends, as plain data: nothing here needs torch or an accountant."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedmosaic.protos.errors import AccountingError


@dataclass(frozen=True, slots=True)
class GaussianEvent:
    """`steps` releases of a Poisson-subsampled Gaussian mechanism under add/remove of one record.

    Each step sums the clipped contributions of a Poisson sample and adds N(0, σ²C²) per coordinate;
    an empty sample still releases noise and still counts as a step. The clipping norm C does not
    enter the accounting: only its ratio to the noise, σ, does.

    Args:
        noise_multiplier: σ, noise standard deviation in units of the clipping norm, ≥ 0 and finite;
            0 means that nothing protects the release (ε = ∞).
        sampling_rate: q in (0, 1], the probability with which each record enters one step.
        steps: number of releases, ≥ 0.

    Raises:
        AccountingError: a value is outside its domain.

    Reference:
        Abadi et al. 2016, section 3; Mironov, Talwar and Zhang 2019 (arXiv:1908.10530), section 3.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "sampling_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise AccountingError(f"{name} is {value!r}; give a number")
            object.__setattr__(self, name, float(value))
        if not math.isfinite(self.noise_multiplier) or self.noise_multiplier < 0:
            raise AccountingError(
                f"noise_multiplier is {self.noise_multiplier}; it must be finite and at least 0 "
                "(noise standard deviation divided by the clipping norm)"
            )
        if not 0.0 < self.sampling_rate <= 1.0:
            raise AccountingError(
                f"sampling_rate is {self.sampling_rate}; it must be in (0, 1]: the probability with which "
                "a record enters a step (1 for a release over all records)"
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise AccountingError(f"steps is {self.steps!r}; it must be a whole number of at least 0")

    @property
    def is_private(self) -> bool:
        """Whether any noise is added, or nothing is released at all."""
        return self.noise_multiplier > 0 or self.steps == 0


UNPROTECTED = GaussianEvent(noise_multiplier=0.0, sampling_rate=1.0, steps=1)
"""One release without noise: ε = ∞ for everybody who can read it."""


def merge_events(events: Iterable[GaussianEvent]) -> tuple[GaussianEvent, ...]:
    """Add up the steps of events with equal (σ, q), drop empty ones, and sort.

    Composition does not depend on order (the schedule is fixed in advance), so two histories that
    merge to the same tuple have the same ε. Accountants cost time per distinct row.

    Args:
        events: any order, from any channels.

    Returns:
        One event per distinct (σ, q) with at least one step, sorted by (σ, q).
    """
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        if event.steps:
            key = (event.noise_multiplier, event.sampling_rate)
            steps[key] = steps.get(key, 0) + event.steps
    return tuple(GaussianEvent(sigma, rate, count) for (sigma, rate), count in sorted(steps.items()))
