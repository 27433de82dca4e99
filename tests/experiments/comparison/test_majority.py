"""The score of whoever always gives the most frequent answer stands beside every other one."""

import math
from pathlib import Path
from typing import Any

import pytest

from fedmosaic.client.model.examples import Example
from fedmosaic.experiments.comparison.majority import majorities, majority_accuracy


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
