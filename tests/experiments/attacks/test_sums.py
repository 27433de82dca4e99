"""Coalitions against a group's sum: the claim holds up to t, is passed beyond, and a hole would be seen."""

import numpy as np
import pytest

from fedmosaic.client.round.group_steps import GroupSum, mixed_gradient, shared_branch
from fedmosaic.experiments.attacks import sums as attack_sums
from fedmosaic.experiments.attacks.statistics.empirical import epsilon_of_noise
from fedmosaic.experiments.attacks.statistics.one_run import one_run_figure
from fedmosaic.experiments.attacks.statistics.results import AttackResult
from fedmosaic.experiments.attacks.statistics.roc import ceiling_of
from fedmosaic.experiments.attacks.sums import sum_refusals, sum_results
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.accounting.leverage import noise_share
from fedmosaic.privacy.federation.terms import GroupSumTerms
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import SeededTestNoise
from fedmosaic.privacy.mechanism.shares import noisy_share, plan_grid

TERMS, SIGMA = GroupSumTerms(minimum_contributors=6, colluders=2), 0.6
CLAIM = epsilon_of_noise(SIGMA)
GAUSSIAN = "certified ε, Gaussian scores"


@pytest.fixture(scope="module")
def results() -> list[AttackResult]:
    found = sum_results(
        TERMS, SIGMA, SeededTestNoise(1), np.random.default_rng(1), canaries=4000, setting="product"
    )
    return list(found)


def certified(result: AttackResult) -> float:
    return next(figure.value for figure in result.figures if figure.name == GAUSSIAN)


def test_up_to_t_the_claim_holds_and_one_more_passes_it(results: list[AttackResult]) -> None:
    *coalitions, late = results
    within, beyond = coalitions[:4], coalitions[4:]
    assert not any(result.broken for result in results)
    assert all(result.epsilon == pytest.approx(CLAIM) for result in within)
    # t members who collude, add no noise, or leave one half of a split group leave exactly the claim's noise.
    assert all(0.9 * CLAIM < certified(result) < 1.03 * CLAIM for result in within[1:])
    assert certified(within[0]) < 0.8 * CLAIM
    assert all(certified(result) > 1.1 * CLAIM for result in beyond)
    own = epsilon_of_noise(noise_share(SIGMA, 6, 2))
    assert certified(beyond[-1]) == pytest.approx(own, rel=0.05)
    assert late.figures[0].value == pytest.approx(0.5, abs=0.06)


def test_members_that_add_less_noise_than_they_promise_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mechanism that is broken on purpose: every member adds two thirds of its noise."""
    monkeypatch.setattr(
        attack_sums,
        "plan_grid",
        lambda members, batch, noise, bits: plan_grid(members, batch, noise / 1.5, bits),
    )
    found = sum_results(
        TERMS, SIGMA, SeededTestNoise(1), np.random.default_rng(1), canaries=4000, setting="product"
    )
    against_t = [result for result in found if result.release.endswith("(t)")]
    assert len(against_t) == 2
    assert all(result.broken for result in against_t)


@pytest.mark.parametrize("noisy", [True, False])
def test_steps_of_noisy_sums_keep_the_claim_and_steps_of_unnoised_ones_do_not(noisy: bool) -> None:
    """The shared branch is read like a release; broken on purpose, the optimizer gets the sums themselves."""
    sigma, rounds, canaries, source = 2.0, 2, 1000, SeededTestNoise(1)
    included = np.random.default_rng(1).random(canaries) < 0.5
    grid = plan_grid(6, 1, noise_share(sigma, 6, 2), 32)
    gradients = []
    for _ in range(rounds):
        total = included * grid.steps
        if noisy:
            shares = [noisy_share(ClippedSum.empty(canaries), grid, source) for _ in range(4)]
            total = total + np.sum(shares, axis=0)
        gradients.append(mixed_gradient([GroupSum(total / grid.steps, 6.0)], [1.0]))
    figure = one_run_figure(
        -shared_branch(np.zeros(canaries), gradients, 0.1, rounds),
        included,
        lambda factor: ceiling_of([GaussianEvent(sigma * factor, 1.0, rounds)]),
        lambda factor: epsilon_of_noise(sigma * factor / rounds**0.5),
    )
    assert figure.broken is not noisy


def test_every_attempt_to_split_a_group_is_refused_with_a_reason() -> None:
    found = sum_refusals(TERMS)
    assert len(found) == 10
    assert [result.attempt for result in found if result.broken] == []
    assert all(len(result.answer) > 30 for result in found)
