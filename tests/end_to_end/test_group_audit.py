"""One run of a group of eight, real sessions and gradients, audited by the server with t members."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from end_to_end import federation_of_vectors as fv
from end_to_end.federation_of_vectors import PROFILE, SeededClient, VectorLearner, in_process, run_all
from fedmosaic.client.colora import write_shared
from fedmosaic.client.dp.engine import example_gradient, only_shared_branch
from fedmosaic.client.dp.training import PrivateRound
from fedmosaic.client.model.examples import EncodedExample
from fedmosaic.client.model.loss import training_mode
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.planning import AdapterPlan, group_grid
from fedmosaic.client.progress import Progress
from fedmosaic.client.round.releases import Releases
from fedmosaic.experiments.attacks.statistics.empirical import epsilon_of_noise
from fedmosaic.experiments.attacks.statistics.one_run import one_run_figure
from fedmosaic.experiments.attacks.statistics.results import Figure
from fedmosaic.experiments.attacks.statistics.roc import ceiling_of
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.terms import AdapterTerms, ScheduleTerms, Terms
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import IntArray, NoiseSource
from fedmosaic.privacy.mechanism.shares import ShareGrid, noisy_share
from tiny import random_texts, tiny_colora

pytestmark = pytest.mark.slow

MEMBERS = tuple(f"m{number}" for number in range(8))
COLLUDERS = MEMBERS[6:]
SIGMA, SUMS, CANARIES, BATCH = 10.0, 2, 60, 30
TERMS = Terms.model_validate(
    {
        "adapter": AdapterTerms(rank=4, alpha=8, blocks=2, protection="distributed-dp"),
        "adapter_privacy": {
            "steps_per_round": 1,
            "expected_batch_size": BATCH,
            "target_epsilon": 50.0,
            "clipping_norm": 0.2,
        },
        "group_sums": {
            "minimum_contributors": 8,
            "colluders": 2,
            "noise_multiplier": SIGMA,
            "learning_rate": 0.01,
        },
        "profile": PROFILE,
        "schedule": ScheduleTerms(rounds=SUMS + 1, quorum=4, round_deadline_seconds=120),
        "encryption": {"backend": "plain"},
    }
)
TEXTS = random_texts([6] * CANARIES, answer=2)
COINS = np.random.default_rng(3).random(CANARIES) < 0.5


@dataclass
class TinyLearner(VectorLearner):
    """A tiny model that trains as the product does; the first member has the canaries of the coins."""

    examples: list[EncodedExample] = field(default_factory=list)
    shares: dict[int, np.ndarray] = field(default_factory=dict)
    branches: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model = tiny_colora(initializer_range=0.3)

    def load_shared(self, vector: np.ndarray) -> None:
        self.local = vector
        write_shared(self.model, vector, "local")

    def group_share(self, round_number: int, members: int, releases: Releases) -> np.ndarray:
        self.branches[round_number] = self.local
        private = PrivateRound(self.model, self.examples, TERMS, TrainingSettings(), releases, Progress())
        share = private.share(round_number, members)
        assert share is not None
        self.shares[round_number] = share
        return share

    def train_personal(self, round_number: int) -> None:
        pass


@dataclass
class Member(SeededClient):
    """A client with such a learner, and noise that a test can repeat."""

    plan: AdapterPlan = field(default_factory=lambda: AdapterPlan(SIGMA, 1.0))

    def make_learner(self, agreed: Terms) -> TinyLearner:
        own = [text for text, coin in zip(TEXTS, COINS, strict=True) if coin]
        others = random_texts([6] * 3, seed=100 + self.seed)
        return TinyLearner(self.seed, agreed, examples=others if self.seed else own)


def gradients(learner: TinyLearner, round_number: int) -> np.ndarray:
    """(CANARIES, D) clipped gradients of all canaries at the branch of a round, in clipping norms."""
    write_shared(learner.model, learner.branches[round_number], "local")
    with only_shared_branch(learner.model) as cores, training_mode(learner.model, False):
        rows = torch.stack([example_gradient(learner.model, cores, text) for text in TEXTS]).double().numpy()
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    assert (norms > TERMS.adapter_privacy.clipping_norm).all(), (
        "every canary has the largest allowed gradient"
    )
    return np.asarray(rows / norms)


def audited(directory: Path) -> tuple[Figure, float]:
    """The ε that the sums of one run certify against server and t members, beside what was charged."""
    coordinator: Any = fv.coordinator_of(fv.make_federation(directory, TERMS, MEMBERS))
    clients: dict[str, Any] = {name: Member(directory, name, seed) for seed, name in enumerate(MEMBERS)}
    try:
        assert not run_all({n: c.session(in_process(coordinator, n)) for n, c in clients.items()})
        steps, known, seen = group_grid(TERMS, 8).steps, [], []
        for total in coordinator._run.sums._totals:
            told = [clients[name].learner.shares[total.round] for name in COLLUDERS]
            seen.append((np.frombuffer(total.vectors[0], dtype="<i4") - sum(told)) / steps)
            known.append(gradients(clients[MEMBERS[0]].learner, total.round))
        charged = [r.event() for r in clients["m0"].ledger.export() if r.kind == "RESERVED" and r.round > 1]
    finally:
        for part in (coordinator, *clients.values()):
            part.close()
    assert charged == [GaussianEvent(SIGMA, 1.0, 1)] * SUMS
    # How much of every canary is in the sums, by least squares over all rounds.
    scores, *_ = np.linalg.lstsq(np.hstack(known).T, np.concatenate(seen), rcond=None)

    def claim(factor: float) -> list[GaussianEvent]:
        return [GaussianEvent(SIGMA * factor, 1.0, SUMS)]

    figure = one_run_figure(
        scores, COINS, lambda s: ceiling_of(claim(s)), lambda s: epsilon_of_noise(SIGMA * s / SUMS**0.5)
    )
    assert figure.bound is not None
    return figure, figure.bound


def test_what_the_sums_of_a_run_certify_stays_under_the_claim(tmp_path: Path) -> None:
    figure, bound = audited(tmp_path / "f")
    assert not figure.broken
    assert figure.value < bound


def test_the_audit_sees_members_that_hardly_add_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quiet(total: ClippedSum, grid: ShareGrid, noise: NoiseSource) -> IntArray:
        share = noisy_share(total, grid, noise)
        return total.units + (share - total.units) // 50

    monkeypatch.setattr("fedmosaic.client.dp.training.noisy_share", quiet)
    figure, bound = audited(tmp_path / "f")
    assert figure.broken
    assert figure.value > 1.5 * bound
