"""Comparisons count what they say, show ε beside accuracy, and the page needs nothing from elsewhere."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedmosaic.client.model.examples import Example
from fedmosaic.experiments.comparison import report
from fedmosaic.experiments.comparison import runs as comparison
from fedmosaic.experiments.comparison.record import majorities, majority_accuracy
from fedmosaic.experiments.comparison.runs import Group, Run, group_runs, relevance_quality
from fedmosaic.experiments.comparison.tables import epsilon_text, gains, markdown, pooled
from fedmosaic.experiments.runs import command as runner
from fedmosaic.experiments.scenario.metrics import Pair
from fedmosaic.protos.errors import ConfigurationError


def _run(seed: int, own: float, method: str = "fedavg", epsilon: float | None = math.inf) -> Run:
    return Run(
        scenario="s, all",
        method=method,
        seed=seed,
        curve={0: Pair(0.1, 0.1), 1: Pair(0.0, math.nan), 2: Pair(own, math.nan)},
        epsilon={"server": epsilon, "recipients": math.inf},
        sent=1000.0,
        seconds=2.0,
    )


def test_seeds_of_one_method_form_a_group_with_an_interval() -> None:
    groups = group_runs([_run(0, 0.4), _run(1, 0.6), _run(0, 0.5, "local <x>")])
    assert [(g.method, len(g.runs)) for g in groups] == [("fedavg", 2), ("local <x>", 1)]
    last, auc, others, others_auc = groups[0].figures()
    assert last is not None
    assert last.mean == pytest.approx(0.5)
    # t(0.975, 1) = 12.706; standard error = 0.1.
    assert last.half_width == pytest.approx(1.2706, rel=1e-4)
    assert auc is not None
    assert auc.mean == pytest.approx(0.25)
    assert others is others_auc is None


def test_one_seed_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="one seed"):
        group_runs([_run(0, 0.4), _run(0, 0.4)])


def test_the_largest_epsilon_of_the_runs_is_shown() -> None:
    group = Group("s", "m", (_run(0, 0.4, epsilon=1.0), _run(1, 0.4, epsilon=3.0)))
    assert group.epsilon("server") == 3.0
    assert [epsilon_text(value) for value in (None, math.inf, 1.234)] == ["cryptography", "∞", "1.23"]
    assert Group("s", "m", (_run(0, 0.4, epsilon=None),)).epsilon("server") is None


def test_relevance_is_the_share_of_pairs_in_the_right_order() -> None:
    similarity: list[list[float | None]] = [
        [1.0, 0.9, 0.1, 0.5],
        [0.9, 1.0, 0.5, None],
        [0.1, 0.5, 1.0, 0.4],
        [0.5, None, 0.4, 1.0],
    ]
    # Pairs of one group: 0.9 and 0.4. Of two: 0.1, 0.5, 0.5, and 0 for the unknown one.
    assert relevance_quality(["a", "a", "b", "b"], similarity) == pytest.approx((4 + 2) / 8)
    assert math.isnan(relevance_quality(["a", "a", "", ""], similarity))
    assert math.isnan(relevance_quality(["", "", "", ""], similarity))


def test_there_are_methods_by_scenarios_and_a_table_per_scenario() -> None:
    static = replace(_run(0, 0.5), scenario="t, static")
    runs = [_run(0, 0.4), _run(1, 0.6), static, replace(_run(0, 0.3, "local"), scenario="t, static")]
    groups = group_runs(runs)
    text = markdown(groups)
    overview, *_ = text.split("**Self A_AUC, %**")
    assert overview.startswith(
        "**Self A_last, %**\n\n| method | ε server | ε recipients | s, all | t, static"
    )
    assert "| `local` | ∞ | ∞ | - | 30.0 |" in overview
    assert "| `fedavg` | ∞ | ∞ | 50.0 ± 127.1 | 50.0 |" in overview
    assert text.count(" | 1.0 | - | 2 |") == 3
    assert markdown([group for group in groups if group.scenario == "t, static"]).count("| method |") == 2
    assert text.count("| method | seeds |") == 2
    assert "| `fedavg` | 2 | ∞ | ∞ | 50.0 ± 127.1 |" in text


def test_gains_are_paired_by_seed() -> None:
    runs = [_run(0, 0.4), _run(1, 0.6), _run(2, 0.9), _run(0, 0.3, "local"), _run(1, 0.5, "local")]
    groups = group_runs(runs)
    last, _, others, others_auc = groups[0].gains(groups[1])
    # The third seed has no partner; the two others differ by the same 0.1, so nothing is left of the spread.
    assert last is not None
    assert (last.mean, last.count) == pytest.approx((0.1, 2))
    assert last.half_width == pytest.approx(0.0, abs=1e-9)
    assert others is others_auc is None
    assert gains(groups) == [("fedavg", ("+10.0 ± 0.0", "+5.0 ± 0.0", "-", "-"))]
    assert gains(groups[:1]) == []
    assert gains(groups, "fedavg") == [("local", ("-10.0 ± 0.0", "-5.0 ± 0.0", "-", "-"))]
    assert "| `fedavg` | +10.0 ± 0.0 |" in markdown(groups)
    assert "Against" not in markdown(groups[:1])


def test_gains_over_several_scenarios_are_paired_within_each() -> None:
    second = [
        replace(_run(0, own, method), scenario="t, static") for own, method in ((0.9, "a"), (0.6, "local"))
    ]
    groups = group_runs([_run(0, 0.4, "a"), _run(0, 0.3, "local"), *second])
    together = pooled(groups)
    assert [len(group.runs) for group in together] == [2, 2]
    # 0.1 in one scenario and 0.3 in the other; across them it would be 0.6 and -0.2.
    ((method, (last, *_)),) = gains(together)
    assert (method, last.split(" ")[0]) == ("a", "+20.0")
    assert "all scenarios together" in markdown(groups)


def test_finished_runs_are_compared_on_the_command_line(
    tmp_path: Path, tiny_scenario: Any, tiny_pair: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    places = []
    for method in ("local", "fedavg", "fedmosaic"):
        scenario = tiny_pair(method=method, schedule={"rounds": 1})
        # Of one architecture, so that averages are of something.
        scenario = scenario.model_copy(update={"clients": tiny_scenario().clients[1::2]})
        places.append(runner.run_here(scenario, tmp_path, tmp_path, Console(file=io.StringIO())))
    with pytest.raises(ConfigurationError, match="there is no run of 'ditto'"):
        report.main([*map(str, places), "--against", "ditto"])
    with pytest.raises(ConfigurationError, match="are for one run"):
        report.main([*map(str, places), "--html", str(tmp_path / "page.html")])
    assert report.main([*map(str, places)]) == 0
    text = capsys.readouterr().out
    for method in ("local", "fedavg", "fedmosaic"):
        assert f"| `{method}` |" in text
    by_method = {run.method: run for run in map(comparison.compared_run, places)}
    assert by_method["local"].epsilon == {"server": 0.0, "recipients": 0.0}
    assert by_method["local"].sent == 0
    assert by_method["fedavg"].epsilon["recipients"] == math.inf
    assert by_method["fedmosaic"].epsilon["server"] == math.inf
    assert by_method["fedmosaic"].sent > 0
    local = by_method["local"].training_flops
    assert local == by_method["fedavg"].training_flops, "sharing costs no training"
    assert local is not None
    _, _, heads, _, cells, *_ = markdown(group_runs([by_method["local"]])).split("\n")
    shown = dict(zip(heads.split(" | "), cells.split(" | "), strict=True))
    assert float(shown["TFLOP"]) == pytest.approx(local / 1e12, rel=0.01)
    assert set(by_method["fedavg"].curve) == {0, 1}
    # Half of every test set has one of two answers, so that no score above 0.5 is by itself an achievement.
    assert 0.5 <= by_method["fedavg"].majority <= 1.0
    assert "always the most frequent answer: Self" in text


def test_a_run_without_scores_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scenario.json").write_text(json.dumps({"clients": []}))
    (tmp_path / "federation/clients/a/state").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="client a has no scores by round"):
        comparison.compared_run(tmp_path)
    with pytest.raises(ConfigurationError):
        comparison.compared_run(tmp_path / "nowhere")


def test_the_majority_is_what_always_the_most_frequent_answer_scores() -> None:
    answers = ["yes", "yes", "no", "yes"]
    examples = [Example(str(n), "?", answer, ("no", "yes")) for n, answer in enumerate(answers)]
    assert majority_accuracy(examples) == 0.75
    assert math.isnan(majority_accuracy([]))
    assert math.isnan(majority_accuracy([*examples, Example("4", "?", "a written answer")]))


def test_the_majorities_of_a_run_are_over_the_rows_that_it_scores(tmp_path: Path, tiny_scenario: Any) -> None:
    scenario = tiny_scenario(evaluation_examples=1).model_dump(mode="json")
    assert majorities(scenario) == {f"client-{n}": pytest.approx(1.0) for n in range(4)}
    scenario["clients"][0]["test"] = str(tmp_path / "gone.jsonl")
    assert math.isnan(majorities(scenario)["client-0"])
