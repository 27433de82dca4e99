"""What a release spends and allows, as plain data: nothing here needs torch or an accountant."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from fedmosaic.privacy.configuration import Frozen
from fedmosaic.protos.errors import AccountingError

Epsilon = Annotated[
    float,
    Field(ge=0.0),
    BeforeValidator(lambda value: math.inf if value == "infinity" else value),
    PlainSerializer(lambda value: "infinity" if value == math.inf else value, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"const": "infinity"}]}),
]
"""ε ≥ 0. JSON has no infinity, and null would read as "not applicable", so ∞ is the string "infinity"."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True, slots=True)
class GaussianEvent:
    """`steps` releases of a Poisson-subsampled Gaussian mechanism under add/remove of one record.

    Each step sums the clipped contributions of a Poisson sample of rate q in (0, 1] and adds N(0, σ²C²) per
    coordinate; an empty sample still releases noise and still counts as a step. σ, `noise_multiplier`, is in
    units of the clipping norm C, ≥ 0 and finite; 0 means that nothing protects the release (ε = ∞).
    AccountingError if a value is outside its domain.

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
    """Add up the steps of events with equal (σ, q), drop empty ones, and sort by (σ, q).

    Composition does not depend on order (the schedule is fixed in advance), so two histories that
    merge to the same tuple have the same ε. Accountants cost time per distinct row.
    """
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        if event.steps:
            key = (event.noise_multiplier, event.sampling_rate)
            steps[key] = steps.get(key, 0) + event.steps
    return tuple(GaussianEvent(sigma, rate, count) for (sigma, rate), count in sorted(steps.items()))


class AttackBounds(Frozen):
    """What any membership attacker achieves at most, from the whole trade-off curve."""

    gaussian_mu: Epsilon
    """Smallest μ such that the release is at least as private as N(0, 1) against N(μ, 1) at every ε ≥ 0 whose
    δ is at least the stated one; exact for full-batch Gaussians."""
    advantage: Share
    """Largest TPR - FPR."""
    true_positive_rate_at_1_percent: Share
    """Largest TPR at a false positive rate of 1 %."""
    true_positive_rate_at_0_1_percent: Share
    """Largest TPR at a false positive rate of 0.1 %."""
