"""The page counts intervals that lie above their ceiling, and puts what nobody may miss above the tables."""

import pytest

from fedmosaic.experiments.attacks.report import markdown
from fedmosaic.experiments.attacks.statistics.results import AttackReport, AttackResult, Figure, RefusalResult


def report(*figures: Figure, headline: str = "", **more: object) -> AttackReport:
    results: tuple[AttackResult, ...] = ()
    if figures:
        result = AttackResult(
            attack="Membership",
            adversary="server",
            sees="the release",
            statistic="likelihood ratio",
            release="σ = 8",
            setting="product",
            epsilon=0.43,
            figures=figures,
            headline=headline,
        )
        results = (result,)
    fields = {"run": "r", "created": "", "seconds": 120.0, "command": "c", "machine": "m", "results": results}
    return AttackReport.model_validate(fields | more)


ABOVE = Figure(name="AUC", value=0.55, low=0.54, high=0.56, bound=0.535)
AROUND = Figure(name="TPR at 1 % FPR", value=0.014, low=0.012, high=0.016, bound=0.014)
CERTIFIED = Figure(name="certified ε, one run", value=1.0, low=0.9, high=3.0, bound=0.8)
BROKEN = Figure(name="AUC", value=0.9, low=0.89, high=0.91, bound=0.6, broken=True)


def test_an_interval_above_its_ceiling_is_named_beside_what_chance_gives() -> None:
    page = markdown(report(ABOVE, AROUND, CERTIFIED))
    assert "1 of 2 intervals here lie wholly above their ceiling" in page
    assert "AUC of likelihood ratio on σ = 8: 0.550 [0.540, 0.560], ceiling 0.535" in page
    assert "0 of 1 intervals" in markdown(report(AROUND))
    assert "They are" not in markdown(report(AROUND))
    assert "intervals here" not in markdown(report(Figure(name="AUC", value=0.6, low=0.5, high=0.7)))


@pytest.mark.parametrize(("value", "shown"), [(3e-7, "3e-07"), (0.0, "| 0 |")])
def test_tiny_numbers_are_not_shown_as_zero(value: float, shown: str) -> None:
    assert shown in markdown(report(Figure.exact("error", value)))


def test_a_report_names_what_is_broken_and_claims_no_more_than_was_tried() -> None:
    refusal = RefusalResult(attempt="one-hot row", party="server", tried=3, refused=2)
    broken = report(BROKEN, refusals=(refusal,))
    assert len(broken.alarms) == 2
    assert "AUC is 0.9" in broken.alarms[0]
    assert "1 of 3 attempts went through" in broken.alarms[1]
    assert AttackReport.model_validate_json(broken.model_dump_json()) == broken
    page = markdown(broken)
    assert "BROKEN" in page
    assert "above its bound" in page
    assert "nothing is shown" in markdown(report())


def test_a_report_of_an_earlier_version_is_read() -> None:
    assert AttackReport.model_validate(report(AROUND).model_dump() | {"later": []}) == report(AROUND)
