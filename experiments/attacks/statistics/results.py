"""What an attack found, as data: who attacked, what was seen, how well it went, and what was the limit.

A figure has a 95 % interval for the reader and a verdict for the machine, which asks for far stronger
evidence: a report holds dozens of figures, and the strongest attacks sit exactly at their bound.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Annotated, Final, Literal

from pydantic import Field
from scipy.stats import beta

from fedmosaic.experiments.scenario.metrics import interval
from fedmosaic.privacy.accounting.events import Epsilon
from fedmosaic.privacy.configuration import Frozen
from fedmosaic.protos.errors import FedMosaicError

CONFIDENCE: Final = 0.95
ALARM_LEVEL: Final = 1e-4
"""Chance with which one figure of a mechanism that keeps its promise is called broken."""
DELTA: Final = 1e-5
"""δ of every ε in a report."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Setting = Literal["product", "no_sanitiser", "authors", "variant"]
"""The product as it runs, without or with the authors' sanitiser, or the product with other parameters."""


def clopper_pearson(hits: float, size: float, confidence: float) -> tuple[float, float]:
    """Exact two-sided interval of a binomial share; sizes need not be whole numbers."""
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if hits <= 0.0 else float(beta.ppf(tail, hits, size - hits + 1.0))
    high = 1.0 if hits >= size else float(beta.ppf(1.0 - tail, hits + 1.0, size - hits))
    return low, high


class Figure(Frozen):
    """One number that an attack reached, with its 95 % interval.

    `bound` is what the claimed guarantee allows at most, None where nothing bounds it. The figure is `broken`
    if it lies above that at a confidence of 1 - `ALARM_LEVEL`.
    """

    name: str
    value: Finite
    low: Finite
    high: Finite
    bound: Epsilon | None = None
    broken: bool = False

    @classmethod
    def exact(cls, name: str, value: float, bound: float | None = None, broken: bool = False) -> "Figure":
        """A number without uncertainty."""
        return cls(name=name, value=value, low=value, high=value, bound=bound, broken=broken)

    @classmethod
    def spread(cls, name: str, values: Sequence[float]) -> "Figure":
        """The mean of some values, between the least and the most of them."""
        return cls(name=name, value=fmean(values), low=min(values), high=max(values))

    @classmethod
    def mean(cls, name: str, values: Sequence[float]) -> "Figure":
        """The mean of independent shares with Student's interval; [0, 1] if there are too few."""
        found = interval(values)
        if found is None or found.half_width is None:
            return cls(name=name, value=values[0] if values else 0.5, low=0.0, high=1.0)
        low, high = found.mean - found.half_width, found.mean + found.half_width
        return cls(name=name, value=found.mean, low=max(0.0, low), high=min(1.0, high))

    @classmethod
    def share(cls, name: str, hits: float, size: int) -> "Figure":
        """A share of independent trials with its exact interval."""
        low, high = clopper_pearson(hits, size, CONFIDENCE)
        return cls(name=name, value=hits / size, low=low, high=high)


class CurvePoint(Frozen):
    """One point of a ROC curve."""

    false_positive_rate: Annotated[float, Field(ge=0.0, le=1.0)]
    true_positive_rate: Annotated[float, Field(ge=0.0, le=1.0)]


class AttackResult(Frozen):
    """One attack on one kind of release; results of one `attack` stand together.

    Attributes:
        sees: what that adversary has.
        statistic: what it computes.
        release: what was attacked, in words.
        epsilon: claimed ε of the release at `delta`; None where ε does not apply.
        by_design: success is what the release is for, and no ε hides it.
        note: what the reader must know to read the figures.
        headline: what nobody may miss; it stands above all figures of the attack.
    """

    attack: str
    adversary: str
    sees: str
    statistic: str
    release: str
    setting: Setting
    epsilon: Epsilon | None = None
    delta: float | None = Field(
        default_factory=lambda fields: None if fields.get("epsilon") is None else DELTA
    )
    figures: tuple[Figure, ...]
    curve: tuple[CurvePoint, ...] = ()
    by_design: bool = False
    note: str = ""
    headline: str = ""

    @property
    def broken(self) -> bool:
        """Whether a figure is above its bound."""
        return any(figure.broken for figure in self.figures)


class RefusalResult(Frozen):
    """What happened to something that must be refused: of so many `tried`, how many were, and the answer."""

    attempt: str
    party: str
    tried: Annotated[int, Field(ge=1)] = 1
    refused: Annotated[int, Field(ge=0)]
    answer: str = ""

    @classmethod
    def of(cls, attempt: str, party: str, carry_out: Callable[[], object]) -> "RefusalResult":
        """Carry an attempt out; whatever is not refused with an error of this package's was accepted."""
        try:
            carry_out()
        except FedMosaicError as error:
            return cls(attempt=attempt, party=party, refused=1, answer=str(error))
        return cls(attempt=attempt, party=party, refused=0, answer="accepted")

    @property
    def broken(self) -> bool:
        """Whether an attempt went through."""
        return self.refused < self.tried


class AttackReport(Frozen, extra="ignore"):
    """Section "attacks" of a privacy report: what was found, and what was left out, with the reason."""

    schema_version: Literal[1] = 1
    run: str
    created: str
    seconds: float
    processor_seconds: float | None = None
    """Of all cores; None in reports of older versions."""
    command: str
    machine: str
    results: tuple[AttackResult, ...]
    refusals: tuple[RefusalResult, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def alarms(self) -> tuple[str, ...]:
        """Every broken bound and every attempt that went through, in words; empty if all is as claimed."""
        found = [
            f"{result.attack} on {result.release}: {figure.name} is {figure.value:.3g} "
            f"({figure.low:.3g} to {figure.high:.3g}), above its bound {figure.bound:.3g}"
            for result in self.results
            for figure in result.figures
            if figure.broken
        ]
        found += [
            f"{refusal.attempt}: {refusal.tried - refusal.refused} of {refusal.tried} attempts went through"
            for refusal in self.refusals
            if refusal.broken
        ]
        return tuple(found)
