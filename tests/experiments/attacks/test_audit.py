"""Audits pass the real mechanisms and catch every broken one, each by a canary of its own."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from builders import tiny_mechanism
from fedmosaic.client.colora import set_active_branches
from fedmosaic.client.dp import training as dp_training
from fedmosaic.client.dp.engine import clip_and_sum, example_gradient, only_shared_branch, private_parameters
from fedmosaic.client.dp.training import PrivateTrainingSettings, noisy_sum
from fedmosaic.experiments.attacks.audit import audit_result, one_run
from fedmosaic.experiments.attacks.profile import audit_result as audit_profile
from fedmosaic.experiments.attacks.statistics.empirical import (
    audit_figures,
    epsilon_of_noise,
    gaussian_epsilon,
    repeat_releases,
)
from fedmosaic.experiments.attacks.statistics.results import AttackResult, Figure
from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.mechanism import profile
from fedmosaic.privacy.mechanism.gaussian import GRID, ClippedSum
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.privacy.mechanism.projection import GradientFactors, PublicMap
from tiny import random_texts, tiny_colora

DELTA = 1e-5
K = 16


class Scaled:
    """Noise that is smaller than asked for."""

    is_test = True

    def __init__(self, factor: float, seed: int = 0) -> None:
        self._factor, self._inner = factor, SeededTestNoise(seed)

    def words(self, size: int) -> Any:
        return self._inner.words(size)

    def gaussian(self, size: int, standard_deviation: float) -> Any:
        return self._inner.gaussian(size, standard_deviation * self._factor)


def mechanism(sigma: float) -> profile.ProfileMechanism:
    return tiny_mechanism((4, 8, K), noise_multiplier=sigma, minimum_examples=1)


def factors(count: int) -> list[GradientFactors]:
    generator = np.random.default_rng(0)
    return [
        GradientFactors(
            generator.standard_normal((3, 4)).astype(np.float32),
            generator.standard_normal((3, 8)).astype(np.float32),
        )
        for _ in range(count)
    ]


def sigma_for(epsilon: float) -> float:
    return noise_multiplier_for(epsilon, DELTA, (), 1.0, 1)


def audited(sigma: float, noise: Any, releases: int = 2000) -> AttackResult:
    agreed = mechanism(sigma)
    return audit_profile(agreed, PublicMap(agreed).rows(factors(20)), noise, releases=releases)


def broken_twice(audit: Callable[[], AttackResult]) -> bool:
    """Whether two audits of real noise raise the alarm; by chance each does so once in ten thousand."""
    return all(audit().broken for _ in range(2))


@pytest.mark.parametrize("epsilon", [1.0, 3.0, 8.0])
def test_the_real_profile_release_keeps_its_promise_and_the_audit_is_nearly_tight(epsilon: float) -> None:
    assert not broken_twice(lambda: audited(sigma_for(epsilon), SecureNoise()))
    result = audited(sigma_for(epsilon), SeededTestNoise(11))
    certified = result.figures[0]
    assert not result.broken
    assert certified.bound == pytest.approx(epsilon, abs=0.03)
    # 2,000 releases, half with the canary, leave a factor of two at ε = 1 and little at ε = 8.
    assert certified.value > {1.0: 0.25, 3.0: 2.0, 8.0: 6.5}[epsilon]


@pytest.mark.parametrize(("epsilon", "releases"), [(1.0, 8000), (3.0, 2000), (8.0, 2000)])
def test_a_noise_that_is_thirty_per_cent_too_small_is_caught(epsilon: float, releases: int) -> None:
    """At ε = 1 the alarm needs more releases; the 95 % bound passes the claim with fewer."""
    result = audited(sigma_for(epsilon), Scaled(0.7), releases)
    assert result.broken
    assert result.figures[0].bound is not None
    assert result.figures[0].value > result.figures[0].bound


def test_an_average_over_raw_sums_pays_once_and_releases_often() -> None:
    """Canary: an example of the first data epoch only, which an average of raw sums keeps releasing."""
    sigma, rounds, decay = sigma_for(8.0), 6, 0.9
    agreed = mechanism(sigma)
    rest = profile.clipped_sum(PublicMap(agreed).rows(factors(5)), agreed)
    row = np.eye(K)[0] * 2.0
    canary = profile.clipped_sum(row[None], agreed)
    noise = SeededTestNoise(3)
    weights = decay ** np.arange(rounds)

    def correct(with_canary: bool) -> np.ndarray:
        average = None
        for number in range(rounds):
            total = rest + canary if with_canary and number == 0 else rest
            average = profile.update_average(average, profile.release(total, agreed, noise), agreed, decay)
        assert average is not None
        return average.vector

    def broken(with_canary: bool) -> np.ndarray:
        state, seen = np.zeros(K), np.zeros(K)
        for number in range(rounds):
            total = rest + canary if with_canary and number == 0 else rest
            # (1 - decay) left out: its scale cancels against a noise of the same scale.
            state = decay * state + (total.units if number == 0 else (1 - decay) * rest.units)
            units = ClippedSum(np.rint(state).astype(np.int64), 0, 0, 1)
            seen += weights[number] * profile.release(units, agreed, noise)
        return seen

    claimed = epsilon_of_noise(sigma)
    good = audit_figures(repeat_releases(correct, row, 1000), claimed)
    bad = audit_figures(repeat_releases(broken, row, 1000), claimed)
    assert not any(figure.broken for figure in good)
    assert bad[0].broken


def test_a_batch_size_that_divides_the_sum_leaks_an_example_without_any_gradient() -> None:
    """Canary: an example of gradient zero. Its presence halves the noise of a sum divided by the batch."""
    sigma, dimensions = sigma_for(1.0), 400
    noise = SeededTestNoise(4)

    def rows(with_canary: bool) -> torch.Tensor:
        return torch.cat([torch.ones(1, dimensions)] + [torch.zeros(1, dimensions)] * with_canary)

    def once(with_canary: bool, divide: bool) -> np.ndarray:
        batch = rows(with_canary)
        noisy = noisy_sum(clip_and_sum(batch, 1.0), 1.0, sigma, noise).numpy()
        return np.array([-np.linalg.norm(noisy / (len(batch) if divide else 1))])

    direction, claimed = np.ones(1), epsilon_of_noise(sigma)
    good = audit_figures(repeat_releases(lambda c: once(c, False), direction, 2000), claimed)
    bad = audit_figures(repeat_releases(lambda c: once(c, True), direction, 2000), claimed)
    assert not any(figure.broken for figure in good)
    assert all(figure.broken for figure in bad), "found without any assumption on the scores as well"


SETTINGS = PrivateTrainingSettings(
    optimizer="sgd",
    learning_rate=1e-3,
    steps=4,
    sampling_rate=1.0,
    expected_batch_size=100,
    max_grad_norm=0.5,
    noise_multiplier=4.0,
)


def adapter_result(randomness: Any = None) -> AttackResult:
    source = SeededTestNoise(5) if randomness is None else randomness
    run = one_run(500, SETTINGS, source, np.random.default_rng(6))
    assert run.event.steps == 4
    return audit_result(run)


def test_the_real_dp_training_keeps_its_promise_in_one_run() -> None:
    assert not broken_twice(lambda: adapter_result(SecureNoise()))
    result = adapter_result()
    assert not result.broken
    assert result.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(4) / 4.0, DELTA), abs=0.02)


def test_a_canary_moves_the_cores_by_exactly_one_clipping_norm_a_step() -> None:
    run = one_run(300, SETTINGS, Scaled(0.0), np.random.default_rng(7))
    np.testing.assert_allclose(run.scores, 4.0 * run.included, atol=1e-4)


def test_sampling_is_seen_by_the_audit_too() -> None:
    """Poisson sampling at 10 %: canaries move rarely, and the claim is that of the sampled mechanism."""
    settings = SETTINGS.model_copy(update={"sampling_rate": 0.1, "steps": 20, "noise_multiplier": 2.0})
    run = one_run(300, settings, SeededTestNoise(9), np.random.default_rng(10))
    assert run.event.sampling_rate == 0.1
    assert np.mean(run.scores[run.included]) == pytest.approx(2.0, abs=0.6)
    assert not audit_result(run).broken


def test_halved_noise_of_the_adapter_is_caught() -> None:
    assert adapter_result(Scaled(0.5, 5)).broken


def test_forgotten_clipping_of_the_adapter_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclipped(rows: torch.Tensor, max_grad_norm: float) -> ClippedSum:
        units = np.rint(rows.numpy().astype(np.float64) / max_grad_norm * GRID).astype(np.int64)
        return ClippedSum(units.sum(axis=0), 0, 0, len(rows))

    monkeypatch.setattr(dp_training, "clip_and_sum", unclipped)
    assert all(figure.broken for figure in adapter_result().figures)


def test_a_personal_branch_left_in_the_forward_pass_is_caught() -> None:
    """Canary: an example that only the personal branch has seen. It turns the gradients of all others."""
    model = tiny_colora()
    private = private_parameters(model)
    memory = copy.deepcopy({name: parameter.detach() for name, parameter in private.items()})
    generator = torch.Generator().manual_seed(2)
    trained = {
        name: value + 0.5 * torch.randn(value.shape, generator=generator) for name, value in memory.items()
    }
    examples = random_texts([8] * 24, answer=3)

    def summed(with_canary: bool, leave_in: bool) -> ClippedSum:
        for name, parameter in private.items():
            parameter.data.copy_(trained[name] if with_canary else memory[name])
        with only_shared_branch(model) as cores:
            if leave_in:
                set_active_branches(model, {"local", "personal"}, layers="shared")
            rows = torch.stack([example_gradient(model, cores, example) for example in examples])
            return clip_and_sum(rows, 1.0)

    sigma, noise = sigma_for(3.0), SeededTestNoise(8)
    claimed = epsilon_of_noise(sigma)

    def audit(leave_in: bool) -> tuple[Figure, ...]:
        sums = {canary: summed(canary, leave_in) for canary in (True, False)}
        change = (sums[True].units - sums[False].units) / GRID
        direction = change if change.any() else np.ones(change.size)

        def once(with_canary: bool) -> np.ndarray:
            return noisy_sum(sums[with_canary], 1.0, sigma, noise).numpy()

        return audit_figures(repeat_releases(once, direction, 400), claimed)

    assert not any(figure.broken for figure in audit(leave_in=False))
    assert any(figure.broken for figure in audit(leave_in=True))


def test_an_audit_says_what_its_releases_could_certify_at_most() -> None:
    (_, assumption_free) = audited(sigma_for(8.0), SecureNoise(), 400).figures
    assert assumption_free.high < 4.0
    assert assumption_free.value <= assumption_free.high
