"""What an attack found, as data: who attacked, what was seen, how well it went, and what was the limit.

A figure has a 95 % interval for the reader and a verdict for the machine. The verdict asks for far
stronger evidence, because a report holds dozens of figures and the strongest attacks sit exactly at
their bound: a figure is `broken` only if it lies above its bound at a confidence of 1 - 1e-4.
"""

from collections.abc import Sequence
from typing import Annotated, Final, Literal

from pydantic import Field

from fedmosaic.privacy.accounting.events import Epsilon
from fedmosaic.privacy.configuration import Frozen
from fedmosaic.protos.errors import ConfigurationError

SCHEMA_VERSION: Final = 1
CONFIDENCE: Final = 0.95
ALARM_LEVEL: Final = 1e-4
"""Chance with which one figure of a mechanism that keeps its promise is called broken."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Setting = Literal["product", "no_sanitiser", "authors", "variant"]


class Figure(Frozen):
    """One number that an attack reached.

    Attributes:
        name: what it is, for example "AUC".
        value: the estimate.
        low: lower end of its 95 % interval.
        high: upper end.
        bound: what the claimed guarantee allows at most; None where nothing bounds it.
        broken: the value is above the bound beyond reasonable doubt, its uncertainty taken into account.
    """

    name: str
    value: Finite
    low: Finite
    high: Finite
    bound: Epsilon | None = None
    broken: bool = False


class CurvePoint(Frozen):
    """One point of a ROC curve."""

    false_positive_rate: Annotated[float, Field(ge=0.0, le=1.0)]
    true_positive_rate: Annotated[float, Field(ge=0.0, le=1.0)]


class AttackResult(Frozen):
    """One attack on one kind of release.

    Attributes:
        attack: name of the attack; results of one attack stand together.
        adversary: who carries it out.
        sees: what that adversary has.
        statistic: what it computes.
        release: what was attacked, in words.
        setting: the product as it runs, a reference without or with the authors' sanitiser, or a
            variant of the product with other parameters.
        epsilon: claimed ε of the release at `delta`; None where ε does not apply.
        delta: δ of it.
        figures: what was reached.
        curve: ROC, if there is one.
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
    delta: float | None = None
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
    """What happened to something that must be refused.

    Attributes:
        attempt: what a malicious party tried.
        party: who tried it.
        tried: number of attempts.
        refused: how many the attacked code refused with an error of its own.
        answer: the refusal, as the operator reads it.
    """

    attempt: str
    party: str
    tried: Annotated[int, Field(ge=1)]
    refused: Annotated[int, Field(ge=0)]
    answer: str = ""

    @property
    def broken(self) -> bool:
        """Whether an attempt went through."""
        return self.refused < self.tried


class LaterRun(Frozen):
    """A later run, whose results took the place of earlier ones of the same attacks.

    Attributes:
        attacks: names of the attacks that it carried out.
        created: time of making, ISO 8601.
        seconds: how long it took.
        processor_seconds: time of all processor cores in it.
        command: how to make it again.
        machine: where it was made.
    """

    attacks: tuple[str, ...]
    created: str
    seconds: float
    processor_seconds: float | None = None
    command: str
    machine: str


class AttackReport(Frozen):
    """Section "attacks" of a privacy report.

    Attributes:
        schema_version: version of this format.
        run: name of the run or scenario.
        created: time of making, ISO 8601.
        seconds: how long the attacks took.
        processor_seconds: time of all processor cores in it; None in reports of older versions.
        command: how to make it again.
        machine: where it was made.
        results: attacks with figures.
        refusals: attempts that must fail outright.
        skipped: attacks that could not be carried out, with the reason; it begins with the part's name.
        later: runs of some of the attacks after the first run, in order.
    """

    schema_version: Literal[1] = 1
    run: str
    created: str
    seconds: float
    processor_seconds: float | None = None
    command: str
    machine: str
    results: tuple[AttackResult, ...]
    refusals: tuple[RefusalResult, ...] = ()
    skipped: tuple[str, ...] = ()
    later: tuple[LaterRun, ...] = ()

    def updated(self, newer: "AttackReport", parts: Sequence[str]) -> "AttackReport":
        """This report with a newer run of some parts in it, which takes the place of what they gave here.

        A later run of which nothing is left is not named any more.

        Args:
            newer: of the same run or scenario.
            parts: names of the parts that were run.

        Raises:
            ConfigurationError: the newer report is of another run.
        """
        if newer.run != self.run:
            raise ConfigurationError(f"the report is of {self.run!r} and cannot take in one of {newer.run!r}")
        found: dict[str, list[AttackResult]] = {}
        for result in newer.results:
            found.setdefault(result.attack, []).append(result)
        results: list[AttackResult] = []
        for result in self.results:
            # An attack's results stand together, so the first one's place is the place of all.
            results += found.pop(result.attack, []) if result.attack in _names(newer) else [result]
        results += [result for group in found.values() for result in group]
        run = LaterRun(
            attacks=tuple(dict.fromkeys([*_names(newer), *(["refusals"] if newer.refusals else [])])),
            **newer.model_dump(include=set(LaterRun.model_fields) - {"attacks"}),
        )
        kept = [reason for reason in self.skipped if not reason.startswith(tuple(f"{p}:" for p in parts))]
        return self.model_copy(
            update={
                "results": tuple(results),
                "refusals": newer.refusals or self.refusals,
                "skipped": tuple(dict.fromkeys([*kept, *newer.skipped])),
                "later": (*(each for each in self.later if not set(each.attacks) <= set(run.attacks)), run),
            }
        )

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


def _names(report: AttackReport) -> tuple[str, ...]:
    return tuple(dict.fromkeys(result.attack for result in report.results))
