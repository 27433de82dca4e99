"""The page counts intervals that lie above their ceiling, and puts what nobody may miss above the tables."""

import pytest
from rich.console import Console

from fedmosaic.experiments.attacks.report import markdown, render
from fedmosaic.experiments.attacks.statistics.results import AttackReport, AttackResult, Figure, RefusalResult
from fedmosaic.protos.errors import ConfigurationError


def report(*figures: Figure, headline: str = "", processor_seconds: float | None = None) -> AttackReport:
    result = AttackResult(
        attack="Membership", adversary="server", sees="the release", statistic="likelihood ratio",
        release="σ = 8", setting="product", epsilon=0.43, delta=1e-5, figures=figures, headline=headline,
    )  # fmt: skip
    return AttackReport(
        run="r", created="", seconds=120.0, processor_seconds=processor_seconds, command="c", machine="m",
        results=(result,),
    )  # fmt: skip


ABOVE = Figure(name="AUC", value=0.55, low=0.54, high=0.56, bound=0.535)
AROUND = Figure(name="TPR at 1 % FPR", value=0.014, low=0.012, high=0.016, bound=0.014)
CERTIFIED = Figure(name="certified ε, one run", value=1.0, low=0.9, high=3.0, bound=0.8)


def test_an_interval_above_its_ceiling_is_named_beside_what_chance_gives() -> None:
    page = markdown(report(ABOVE, AROUND, CERTIFIED))
    assert "1 of 2 intervals here lie wholly above their ceiling" in page
    assert "one in forty does by chance" in page
    assert "AUC of likelihood ratio on σ = 8: 0.550 [0.540, 0.560], ceiling 0.535" in page


def test_without_such_intervals_none_is_named_and_without_ceilings_nothing_is_said() -> None:
    assert "0 of 1 intervals" in markdown(report(AROUND))
    assert "They are" not in markdown(report(AROUND))
    assert "intervals here" not in markdown(report(Figure(name="AUC", value=0.6, low=0.5, high=0.7)))


def test_the_time_of_the_cores_stands_beside_the_time_on_the_clock() -> None:
    assert "in 2.0 minutes (1.5 minutes of one core)" in markdown(report(AROUND, processor_seconds=90.0))
    assert "in 2.0 minutes. Do" in markdown(report(AROUND))


def test_a_headline_stands_above_the_figures_and_in_the_terminal() -> None:
    page = markdown(report(AROUND, headline="One member is enough"))
    assert page.index("**One member is enough.**") < page.index("| release |")
    console = Console(width=120)
    with console.capture() as shown:
        console.print(render(report(AROUND, headline="One member is enough")))
    assert "One member is enough" in shown.get()


def test_tiny_numbers_are_not_shown_as_zero() -> None:
    assert "3e-07" in markdown(report(Figure(name="error", value=3e-7, low=3e-7, high=3e-7)))
    assert "| 0 |" in markdown(report(Figure(name="error", value=0.0, low=0.0, high=0.0)))


def named(attack: str, value: float) -> AttackResult:
    return AttackResult(
        attack=attack, adversary="a", sees="s", statistic="t", release="r", setting="product",
        figures=(Figure(name="AUC", value=value, low=value, high=value),),
    )  # fmt: skip


def whole(*results: AttackResult, run: str = "r", **more: object) -> AttackReport:
    fields = {"run": run, "created": "now", "seconds": 60.0, "command": "c", "machine": "m", **more}
    return AttackReport.model_validate({**fields, "results": results})


def test_a_later_run_of_one_part_replaces_that_attack_and_keeps_the_others() -> None:
    first = whole(
        named("one", 0.1), named("two", 0.2), named("two", 0.3), named("three", 0.4),
        refusals=(RefusalResult(attempt="x", party="p", tried=1, refused=1),),
        skipped=("shadow: no model", "adapter: broken"),
    )  # fmt: skip
    later = whole(named("two", 0.7), named("four", 0.8), created="later", command="again", seconds=30.0)
    found = first.updated(later, ["shadow", "text"])
    assert [(r.attack, r.figures[0].value) for r in found.results] == [
        ("one", 0.1), ("two", 0.7), ("three", 0.4), ("four", 0.8),
    ]  # fmt: skip
    assert found.refusals == first.refusals
    assert found.skipped == ("adapter: broken",)
    assert AttackReport.model_validate_json(found.model_dump_json()) == found
    page = markdown(found)
    assert "Made by `c` on m, now, in 1.0 minutes" in page
    assert "Made later, by `again` on m, later, in 0.5 minutes: two; four." in page
    other = whole(named("one", 0.9), command="other")
    assert [run.command for run in found.updated(other, ["text"]).later] == ["again", "other"]
    assert found.updated(later, ["text"]) == found, "the first later run has nothing left in the report"


def test_reports_of_different_runs_are_not_merged() -> None:
    with pytest.raises(ConfigurationError, match="of 'r' and cannot take in one of 'other'"):
        whole(named("one", 0.1)).updated(whole(named("one", 0.2), run="other"), ["text"])
