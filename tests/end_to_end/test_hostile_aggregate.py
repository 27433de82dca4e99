"""An aggregate that opens, and is chosen by an attacker: the server sees the same client as ever.

One member has a real model, the others hold vectors. What the member's aggregates open to is replaced, as a
server can do with ciphertexts that are malleable, or with two members of its own. Whatever it is, the member
makes the same calls of the same sizes, takes the same number of steps, and lives.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from end_to_end import federation_of_vectors as fv
from end_to_end.test_trained_adapters import ModelClient, random_model
from fedmosaic.client.client import scores_after
from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.planning import AdapterPlan
from fedmosaic.client.progress import Progress
from fedmosaic.client.round.releases import Releases
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from fedmosaic.protos.errors import TrainingError
from fedmosaic.protos.messages import Aggregate, AggregateSection, WeightRow

VICTIM = "ada"
ROUNDS = 4
STEPS = 3
SIGMA, RATE, PRIVATE_STEPS = 3.0, 0.25, 2
Received = Callable[[int], np.ndarray]
"""From the number of values to what an aggregate opens to."""


def signs(bound: float, seed: int) -> Received:
    return lambda size: bound * np.random.default_rng(seed).choice([-1.0, 1.0], size)


def agreed_terms(protection: str) -> Terms:
    base = fv.terms("mask", ROUNDS)
    adapter = AdapterTerms(rank=4, blocks=2, alpha=8.0, protection=protection)
    privacy = {"expected_batch_size": 6, "steps_per_round": PRIVATE_STEPS}
    return Terms.model_validate({**base.model_dump(), "adapter": adapter, "adapter_privacy": privacy})


class Overflowing(ModelLearner):
    """What lies at the bound overflows in its model, as in a deep one of a narrow number format."""

    def load_global(self, section: str, vector: np.ndarray) -> None:
        super().load_global(section, vector)
        if np.abs(vector).max() > 3.9:
            with torch.no_grad():
                for name, parameter in self._model.named_parameters():
                    if "colora_core_global" in name:
                        parameter.mul_(1e37)


class Counting(Progress):
    """Counts the steps of training."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def advance(self, done: int) -> None:
        self.steps.append(done)


class ChargingLearner(fv.VectorLearner):
    """A vector that is charged for as if DP-SGD had made it."""

    def train(self, round_number: int, releases: Releases, give_up: Callable[[], None]) -> None:
        if self.terms.adapter.private:
            event = GaussianEvent(SIGMA, RATE, PRIVATE_STEPS)
            releases.release_adapter(round_number, event, lambda: None, lambda _: None)
        super().train(round_number, releases, give_up)


@dataclass
class Peer(fv.Client):
    def make_learner(self, agreed: Terms) -> ChargingLearner:
        return ChargingLearner(self.seed, agreed)


@dataclass
class Victim(ModelClient):
    """A member with a model; `received` gives what the aggregate of a round opens to, None as it is."""

    received: dict[int, Received] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=lambda: {"steps": STEPS})
    progress: Counting = field(default_factory=Counting)

    def session(self, transport: Any) -> Any:
        session = super().session(transport)
        opened = session._protection.open

        def open_hostile(section: Any, row: Any, key_epoch: int, uploaded: int, size: int) -> np.ndarray:
            found = opened(section, row, key_epoch, uploaded, size)
            change = self.received.get(uploaded + 1)
            return found if change is None else change(size)

        session._protection.open = open_hostile  # type: ignore[method-assign, assignment]  # as received
        return session


@dataclass
class Outcome:
    """What was seen of the victim, and what it is left with."""

    calls: list[str]
    victim: Victim
    errors: dict[str, BaseException]

    @property
    def learner(self) -> ModelLearner:
        found: ModelLearner = self.victim.learner
        return found


class Once:
    """Sessions of one member, one after the other, as its processes are started again."""

    def __init__(self, start: Callable[[], Any], times: int) -> None:
        self._start, self._times = start, times

    def run(self) -> None:
        for number in range(self._times):
            try:
                self._start().run()
            except ConnectionResetError:
                assert number < self._times - 1


def take_part(
    directory: Path, protection: str, model: Path, *, processes: int = 1, **options: Any
) -> Outcome:
    """Run a federation with the victim in it."""
    fv.make_federation(directory, agreed_terms(protection))
    coordinator = fv.coordinator_of(directory)
    plan = AdapterPlan(SIGMA, RATE) if "dp" in protection else AdapterPlan(0.0, RATE)
    calls: list[str] = []
    clients: dict[str, fv.Client] = {
        name: Peer(directory, name, seed, plan=plan) for seed, name in enumerate(fv.MEMBERS)
    }
    victim = Victim(directory, VICTIM, 0, plan=plan, model=model, **options)
    clients[VICTIM] = victim

    def start() -> Any:
        if victim.state is not None:
            victim.close()
        return victim.session(fv.Listed(fv.in_process(coordinator, VICTIM), calls))

    sessions: dict[str, Any] = {
        name: c.session(fv.in_process(coordinator, name)) for name, c in clients.items() if name != VICTIM
    }
    errors = fv.run_all({**sessions, VICTIM: Once(start, processes)})
    coordinator.close()
    for client in clients.values():
        client.close()
    return Outcome(calls, victim, errors)


HOSTILE: dict[int, Received] = {2: signs(4.0, 0), 3: signs(1.0, 2), 4: lambda size: np.full(size, 4.0)}
"""By round: at the bound of what opens, within it, and all values alike."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def honest(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Runs in which nothing is replaced, by protection."""
    return {
        protection: take_part(tmp_path_factory.mktemp("honest") / "f", protection, model)
        for protection in ("encrypted", "dp+encrypted")
    }


@pytest.mark.parametrize("kind", [ModelLearner, Overflowing])
@pytest.mark.parametrize("protection", ["encrypted", "dp+encrypted"])
def test_the_server_sees_the_same_calls_whatever_the_aggregate_opens_to(
    tmp_path: Path, model: Path, honest: dict[str, Outcome], protection: str, kind: type[ModelLearner]
) -> None:
    assert honest[protection].errors == {}
    outcome = take_part(tmp_path / "f", protection, model, kind=kind, received=HOSTILE)
    assert outcome.errors == {}
    assert outcome.calls == honest[protection].calls
    # The time of a round follows the number of steps.
    assert len(outcome.victim.progress.steps) <= len(honest[protection].victim.progress.steps)
    vector = outcome.learner.sections()["shared"]
    assert np.isfinite(vector).all()
    assert vector.any()


def test_an_aggregate_that_cannot_be_trained_with_is_left_out_and_told_at_home(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "fedmosaic.client.learner")
    outcome = take_part(
        tmp_path / "f",
        "encrypted",
        model,
        kind=Overflowing,
        received={2: signs(4.0, 0)},
        training={"steps": STEPS, "blend_received": 0.5},
    )
    assert outcome.errors == {}
    (line,) = caplog.messages
    assert line.startswith("round 2: the loss of step 1 is not finite")
    assert f"{STEPS - 1} of {STEPS} steps are left" in line
    # Not even the share that the local branch is moved by is left of it.
    assert np.abs(outcome.learner.sections()["shared"]).max() < 1.0


def test_after_a_restart_the_aggregate_is_not_loaded_again(tmp_path: Path, model: Path) -> None:
    loaded: list[bool] = []
    died: list[bool] = []

    class Killed(Overflowing):
        def load_global(self, section: str, vector: np.ndarray) -> None:
            loaded.append(bool(np.abs(vector).max() > 3.9))
            super().load_global(section, vector)

        def train(self, round_number: int, releases: Releases, give_up: Callable[[], None]) -> None:
            def give_up_and_die() -> None:
                give_up()
                if not died:
                    died.append(True)
                    raise ConnectionResetError("the process was killed")

            super().train(round_number, releases, give_up_and_die)

    outcome = take_part(
        tmp_path / "f", "encrypted", model, processes=2, kind=Killed, received={2: signs(4.0, 0)}
    )
    assert outcome.errors == {}
    assert died
    assert loaded == [True, False, False], "once in round 2, and an honest one in each of rounds 3 and 4"
    state = tmp_path / "f" / "clients" / VICTIM / "state"
    assert json.loads((state / "given-up.json").read_text()) == 2


def test_training_that_diverges_for_reasons_of_its_own_ends_the_first_round_only(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In round 1 nothing was received yet, and the remedy is in the message. Later the run goes on."""
    learner = Victim(tmp_path, VICTIM, 0, model=model)
    (tmp_path / "clients" / VICTIM).mkdir(parents=True)
    made = learner.make_learner(agreed_terms("encrypted"))
    before = made.sections()["shared"]

    def diverges(_model: Any, _examples: Any, settings: Any, **_: Any) -> None:
        with torch.no_grad():
            for name, parameter in made._model.named_parameters():
                if "colora_core_local" in name:
                    parameter.fill_(np.nan)
        raise TrainingError("the loss is not finite; lower the learning rates", min(2, settings.steps))

    monkeypatch.setattr("fedmosaic.client.learner.train_local", diverges)
    given_up: list[int] = []
    with pytest.raises(TrainingError, match="lower the learning rates"):
        made.train(1, None, lambda: given_up.append(1))  # type: ignore[arg-type]  # nothing is released
    assert given_up == []
    made = learner.make_learner(agreed_terms("encrypted"))
    made.train(2, None, lambda: given_up.append(2))  # type: ignore[arg-type]  # nothing is released
    assert given_up == [2, 2]
    assert np.array_equal(made.sections()["shared"], before)


@pytest.mark.parametrize("protection", ["encrypted", "dp+encrypted"])
def test_under_dp_nobody_remembers_that_training_without_noise_failed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, protection: str
) -> None:
    """After a kill it would decide at which received branch DP-SGD runs, and so what is released."""
    fv.make_federation(tmp_path / "f", agreed_terms(protection))
    victim = Victim(tmp_path / "f", VICTIM, 0, model=model)
    session = victim.session(None)
    monkeypatch.setattr(victim.learner, "train", lambda number, releases, give_up: give_up())
    session._train(2)
    assert victim.state is not None
    assert victim.state.gave_up(2) == (protection == "encrypted")
    victim.close()


def test_nothing_is_opened_in_the_first_round(tmp_path: Path, model: Path) -> None:
    """A server can send a row over uploads that nobody has made; whether that opens is its own affair."""
    fv.make_federation(tmp_path / "f", agreed_terms("encrypted"))
    victim = Victim(tmp_path / "f", VICTIM, 0, model=model, received={1: signs(4.0, 0)})
    session = victim.session(None)
    row = WeightRow(("ben", "cid", "dee"), (2048, 1024, 1024), 12)
    opened: list[str] = []
    session._protection.open = lambda section, *_: opened.append(section.name)
    session._receive(Aggregate(1, (AggregateSection("shared", row, b"x"),), 0, 0))
    victim.close()
    assert opened == []


def test_scores_that_cannot_be_computed_do_not_end_the_client_before_it_reports(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    test = tmp_path / "clients" / VICTIM / "test.jsonl"
    test.parent.mkdir(parents=True)
    question = {"id": "q", "prompt": "red blue", "answer": "cat", "choices": ["cat", "dog"]}
    test.write_text(json.dumps(question) + "\n")
    victim = Victim(tmp_path, VICTIM, 0, model=model, kind=Overflowing, data={"test": test})
    learner = victim.make_learner(agreed_terms("encrypted"))
    assert set(scores_after(learner)) == {"self"}
    learner.load_global("shared", signs(4.0, 0)(learner.sections()["shared"].size))
    assert scores_after(learner) == {}
    assert "a choice's score is not finite" in caplog.text
