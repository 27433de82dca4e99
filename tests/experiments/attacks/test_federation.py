"""Collusion, spoofing and task inference: exact cases, the cap, and what ε does and does not hide."""

from pathlib import Path

import numpy as np
import pytest

from builders import tiny_mechanism
from fedmosaic.experiments.attacks.federation import (
    collusion_results,
    dp_noise_ratio,
    planned_rows,
    simulated_weights,
    spoofing_results,
    task_results,
    weight_matrix,
)
from fedmosaic.experiments.attacks.statistics.results import AttackResult
from fedmosaic.experiments.attacks.target import ServerRun, read_target
from fedmosaic.privacy.federation.terms import RelevanceTerms
from fedmosaic.privacy.mechanism.noise import SeededTestNoise
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import ConfigurationError

TERMS, POLICY = RelevanceTerms(temperature=0.2), AggregationPolicy()
MECHANISM = tiny_mechanism(noise_multiplier=8.0)


def value(result: AttackResult, name: str) -> float:
    return next(f.value for f in result.figures if f.name == name)


def profiles() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    centres = {"a": generator.standard_normal(32), "b": generator.standard_normal(32)}
    return {
        f"{task}{number}": 300 * centre + 8 * generator.standard_normal(32)
        for task, centre in centres.items()
        for number in range(3)
    }


def test_all_but_one_recover_the_last_adapter_exactly_and_movement_or_dp_prevents_it() -> None:
    weights = simulated_weights(5, 3, TERMS, POLICY, 0)
    results = collusion_results(weights, POLICY, source="test", dp_noise=0.5, trials=4)
    rest, moving, private, counts, smallest, chosen = results
    assert value(rest, "error, 4 of 5, 1 aggregate(s) each") < 1e-3
    assert value(rest, "error, 1 of 5, 1 aggregate(s) each") > 0.3
    assert value(moving, "error, 3 of 5, 1 aggregate(s) each") >= 0.0
    assert value(private, "error, 4 of 5, 1 aggregate(s) each") > 0.3
    assert value(counts, "independent rows, 4 of 5 (1 unknown)") == 1
    assert value(counts, "independent rows, 1 of 5 (4 unknown)") == 2
    assert value(smallest, "recipients that suffice, one round") == 3
    assert value(smallest, "recipients that suffice, 2 rounds, adapters at rest") == 2
    # One recipient's single aggregate hides the victim; a second row of anybody's takes the others off.
    assert value(chosen, "server and 1 recipient's aggregate, no key, policy on") > 0.3
    two_rounds = "server and 1 recipient's aggregates of 2 rounds, adapters at rest, no key, policy on"
    assert value(chosen, two_rounds) < 1e-6
    assert value(chosen, "server and 2 recipients' aggregates, no key, policy on") < 1e-6


def test_a_copied_profile_gets_at_most_the_cap_and_sybils_get_more() -> None:
    found = profiles()
    tasks = {name: name[0] for name in found}
    result = spoofing_results(found, MECHANISM.noise_variance, TERMS, POLICY, tasks, 4.0)
    one, two = (value(result, n) for n in ("one copy of the victim's profile", "2 copies (Sybils)"))
    assert value(result, "honest client of another task") < 0.2 < one <= 0.5 + 2**-12
    assert two > one
    assert not result.broken


def test_a_cap_that_is_not_kept_breaks_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    loose = AggregationPolicy(weight_cap=1.0, squares_cap=1.0)

    def uncapped(vectors: object, variance: float, terms: RelevanceTerms, _policy: object) -> object:
        return planned_rows(vectors, variance, RelevanceTerms(temperature=0.15), loose)  # type: ignore[arg-type]

    monkeypatch.setattr("fedmosaic.experiments.attacks.federation.planned_rows", uncapped)
    found = {f"c{number}": 300 * np.eye(32)[number] for number in range(6)}
    assert spoofing_results(found, MECHANISM.noise_variance, TERMS, POLICY).broken


def test_the_task_is_found_whatever_the_noise_and_is_called_by_design() -> None:
    generator = np.random.default_rng(1)
    centres = {name: 3 * np.eye(32)[number] for number, name in enumerate("xyz")}
    rows = {name: centre + 0.3 * generator.standard_normal((200, 32)) for name, centre in centres.items()}
    reference = {name: centre + 0.3 * generator.standard_normal((50, 32)) for name, centre in centres.items()}
    results = task_results(rows, reference, MECHANISM, SeededTestNoise(2), size=100, releases=20, seed=3)
    assert [result.setting for result in results] == ["no_sanitiser", *["variant"] * 3, "product"]
    assert all(result.by_design for result in results)
    assert value(results[0], "right guesses") == 1.0
    assert value(results[-1], "right guesses") > 0.95
    assert value(results[0], "chance") == pytest.approx(1 / 3)


def test_rows_of_a_run_are_read_without_the_last_round() -> None:
    rounds = [{"a": {"b": 0.5, "c": 0.5}}, {"b": {"a": 1.0}}]
    run = ServerRun.model_validate(
        {"results": [{"round": 1, "weights": {"shared": rows}} for rows in rounds]}
    )
    (matrix,) = run.weights(["a", "b", "c"])[:-1]
    np.testing.assert_array_equal(matrix, [[0, 0.5, 0.5], [0, 0, 0], [0, 0, 0]])
    assert ServerRun().weights(["a"]) == []


def test_that_no_coalition_suffices_is_told_as_none() -> None:
    """Where nobody received anything, nobody solves for anything: that is a figure and no error."""
    weights = [weight_matrix({}, [f"m{number}" for number in range(5)])]
    results = collusion_results(weights, POLICY, source="test", dp_noise=None, trials=1)
    smallest = next(r for r in results if r.release.startswith("smallest coalition"))
    assert value(smallest, "coalitions of any size that suffice, one round") == 0


def test_a_path_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="neither a run nor a scenario"):
        read_target(tmp_path)


def test_dp_noise_is_the_ratio_of_noise_to_the_largest_signal() -> None:
    assert dp_noise_ratio(1.0, 0.1, 100, 1000, 10_000) == pytest.approx(100 / (10 * 100))
