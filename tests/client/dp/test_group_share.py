"""A member's part of a group's sum, what one person can move in it, and the shared branch that sums make."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from builders import tiny_mechanism
from fedmosaic.client.dp.training import PrivateRound
from fedmosaic.client.model.examples import EncodedExample
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.planning import AdapterPlan, group_grid
from fedmosaic.client.progress import LoggedProgress, Progress
from fedmosaic.client.round.group_steps import GroupSum, mixed_gradient, shared_branch
from fedmosaic.client.round.records import ClippingRecord
from fedmosaic.client.round.releases import Releases
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from fedmosaic.privacy.mechanism.noise import SeededTestNoise
from fedmosaic.protos.errors import ConfigurationError, PrivacyError
from tiny import random_texts, tiny_colora

S = TypeVar("S")
R = TypeVar("R")
SIGMA = 2.0
TEXTS = [
    replace(text, person=person)
    for text, person in zip(random_texts([6, 7, 5, 6, 8, 6, 7]), "aabbbcd", strict=True)
]


class Silent(SeededTestNoise):
    """Noise of zero, so that what is left is the clipped sum."""

    def gaussian(self, size: int, standard_deviation: float) -> npt.NDArray[np.float64]:
        return np.zeros(size)


class Unbooked(Releases):
    """What `PrivateRound.share` asks of a client's releases, every example in the sample."""

    def __init__(self, path: Path, sigma: float = SIGMA) -> None:
        self.receive_only, self.randomness = False, Silent(0)
        self.charged: list[GaussianEvent] = []
        self._plan = AdapterPlan(sigma, 1.0)
        self.clipping = ClippingRecord(path / "clipping")

    def release_adapter(
        self,
        round_number: int,
        event: GaussianEvent,
        total: Callable[[], S],
        noise: Callable[[S], R],
        store: Callable[[R], str] | None = None,
    ) -> R:
        summed = total()
        self.charged.append(event)
        return noise(summed)


def terms(unit: str) -> Terms:
    return Terms.model_validate(
        {
            "adapter": AdapterTerms(rank=4, alpha=8, blocks=2, protection="distributed-dp"),
            "adapter_privacy": {"steps_per_round": 1, "expected_batch_size": 7, "clipping_norm": 0.3},
            "group_sums": {"minimum_contributors": 6, "noise_multiplier": SIGMA, "unit": unit},
            "profile": tiny_mechanism(),
            "encryption": {"backend": "plain"},
        }
    )


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_colora(initializer_range=0.3)


def share(
    model: nn.Module, tmp_path: Path, unit: str, texts: list[EncodedExample], sigma: float = SIGMA
) -> npt.NDArray[np.float64]:
    releases = Unbooked(tmp_path, sigma)
    found = PrivateRound(model, texts, terms(unit), TrainingSettings(), releases, Progress()).share(2, 6)
    assert found is not None
    assert releases.charged == [GaussianEvent(SIGMA, 1.0, 1)]
    return found / group_grid(terms(unit), 6).steps


@pytest.mark.parametrize("person", "abcd")
def test_all_records_of_a_person_move_the_sum_by_one_clipping_norm_at_most(
    model: nn.Module, tmp_path: Path, person: str
) -> None:
    everybody = share(model, tmp_path, "person", TEXTS)
    others = share(model, tmp_path, "person", [text for text in TEXTS if text.person != person])
    assert np.linalg.norm(everybody - others) <= 1.0
    # By examples, one with several moves it by more: the bound of the person is not there by chance.
    by_example = share(model, tmp_path, "example", TEXTS)
    moved = np.linalg.norm(
        by_example - share(model, tmp_path, "example", [text for text in TEXTS if text.person != person])
    )
    records = sum(text.person == person for text in TEXTS)
    assert (moved > 1.2) == (records > 1)
    assert moved <= records


def test_how_far_the_gradients_are_tells_nothing_of_the_sample(model: nn.Module, tmp_path: Path) -> None:
    def told(count: int) -> list[dict[str, object]]:
        progress = LoggedProgress(tmp_path / f"{count}.jsonl")
        PrivateRound(
            model, TEXTS[:count], terms("example"), TrainingSettings(), Unbooked(tmp_path), progress
        ).share(2, 6)
        lines = (tmp_path / f"{count}.jsonl").read_text().splitlines()
        return [{**json.loads(line), "time": 0} for line in lines]

    assert told(2) == told(5)


def test_an_example_without_a_person_is_refused_before_anything_is_charged(
    model: nn.Module, tmp_path: Path
) -> None:
    releases = Unbooked(tmp_path)
    texts = [*TEXTS[:2], replace(TEXTS[2], person="")]
    asked = PrivateRound(model, texts, terms("person"), TrainingSettings(), releases, Progress())
    with pytest.raises(ConfigurationError, match="training example 3 names no person"):
        asked.share(2, 6)
    assert not releases.charged


def test_a_plan_with_another_noise_than_the_terms_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=r"charged for σ = 3.0, the roster's sums have 2.0"):
        share(model, tmp_path, "example", TEXTS, sigma=3.0)


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_the_steps_are_those_of_adam_with_a_falling_rate(seed: int, count: int) -> None:
    source = np.random.default_rng(seed)
    start, gradients = source.normal(size=5), [source.normal(size=5) for _ in range(count)]
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.95))
    for number, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - number / 20)
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    assert np.allclose(shared_branch(start, gradients, 0.03, 20), parameter.detach().numpy(), rtol=1e-9)


def test_a_round_without_a_sum_takes_no_step() -> None:
    source = np.random.default_rng(0)
    gradient = source.normal(size=5)
    alone = shared_branch(np.zeros(5), [gradient], 0.01, 10)
    assert np.array_equal(shared_branch(np.zeros(5), [gradient, None], 0.01, 10), alone)


def test_the_mix_is_of_means_and_leaves_out_groups_without_a_sum() -> None:
    first, second = GroupSum(np.array([2.0, 4.0]), 2.0), GroupSum(np.array([9.0, 0.0]), 3.0)
    both, one = mixed_gradient([first, second], [0.5, 0.5]), mixed_gradient([first, None], [0.25, 0.75])
    np.testing.assert_allclose(np.array([both, one]), [[2.0, 1.0], [1.0, 2.0]])
    assert mixed_gradient([None, None], [0.5, 0.5]) is None
    assert mixed_gradient([None, second], [1.0, 0.0]) is None
