"""Federations that share noisy sums of their groups: the real session, server, ledger and secure sums."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from end_to_end import federation_of_vectors as fv
from end_to_end.federation_of_vectors import PROFILE, Client, VectorLearner, in_process, run_all
from fedmosaic.client.planning import AdapterPlan, group_grid
from fedmosaic.client.round.group_steps import mixed_gradient, shared_branch
from fedmosaic.client.round.records import digest_of
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.terms import AdapterTerms, GroupSumTerms, ScheduleTerms, Terms
from fedmosaic.privacy.mechanism.gaussian import clipped_sum
from fedmosaic.privacy.mechanism.shares import noisy_share
from fedmosaic.protos.messages import KeyMessage
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.round.sums import VECTOR
from fedmosaic.server.sums import RunSums

MEMBERS = tuple(f"m{number:02}" for number in range(9))
SIGMA = 2.0


def group_terms(
    rounds: int = 4, *, groups: int = 1, minimum: int = 6, colluders: int = 1, sampled: int | None = None
) -> Terms:
    return Terms.model_validate(
        {
            "adapter": AdapterTerms(rank=4, blocks=2, target_modules=("a", "b"), protection="distributed-dp"),
            "adapter_privacy": {"steps_per_round": 1, "expected_batch_size": 10, "target_epsilon": 50.0},
            "group_sums": GroupSumTerms(
                groups=groups,
                minimum_contributors=minimum,
                colluders=colluders,
                noise_multiplier=SIGMA,
                learning_rate=0.1,
            ),
            "profile": PROFILE,
            "schedule": ScheduleTerms(
                rounds=rounds, quorum=4, round_deadline_seconds=60, sampled_clients=sampled
            ),
            "encryption": {"backend": "plain"},
        }
    )


@dataclass
class PullingLearner(VectorLearner):
    """Every example pulls the shared branch towards one point; what it was given is kept."""

    shares: dict[int, np.ndarray] = field(default_factory=dict)
    branches: list[np.ndarray] = field(default_factory=list)
    personal: list[int] = field(default_factory=list)
    dies_in: int = 0

    def load_shared(self, vector: np.ndarray) -> None:
        self.local = vector
        self.branches.append(vector)

    def group_share(self, round_number: int, members: int, releases: Any) -> np.ndarray:
        if round_number == self.dies_in:
            raise KeyboardInterrupt
        grid = group_grid(self.terms, members)
        rows = np.tile(self.local - 1.0, (10, 1))
        self.shares[round_number] = releases.release_adapter(
            round_number,
            GaussianEvent(SIGMA, 0.1, 1),
            lambda: clipped_sum(rows, 1.0, grid.steps),
            lambda total: noisy_share(total, grid, releases.randomness),
            digest_of,
        )
        return self.shares[round_number]

    def train_personal(self, round_number: int) -> None:
        self.personal.append(round_number)


@dataclass
class Member(Client):
    """A client whose learner pulls."""

    plan: AdapterPlan = field(default_factory=lambda: AdapterPlan(SIGMA, 0.1))

    def make_learner(self, agreed: Terms) -> PullingLearner:
        return PullingLearner(self.seed, agreed)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., tuple[Coordinator, dict[str, Member]]]]:
    made: list[Coordinator | Member] = []

    def make(agreed: Terms, members: tuple[str, ...] = MEMBERS) -> tuple[Coordinator, dict[str, Member]]:
        directory = fv.make_federation(tmp_path / "federation", agreed, members)
        coordinator = fv.coordinator_of(directory)
        clients = {name: Member(directory, name, seed) for seed, name in enumerate(members)}
        made.extend([coordinator, *clients.values()])
        return coordinator, clients

    yield make
    for part in made:
        part.close()


def run(coordinator: Coordinator, clients: dict[str, Member]) -> dict[str, BaseException]:
    return run_all({name: client.session(in_process(coordinator, name)) for name, client in clients.items()})


class PassingTime:
    """A clock that passes over the time for which the others wait for a member that is gone, from a round on.

    Before that round the member is only the last to answer, now and then.
    """

    def __init__(self, coordinator: Any, gone: str, since: int) -> None:
        self._run, self._gone, self._since = coordinator._run, gone, since
        self._passed: set[tuple[int, str]] = set()
        self._run.clock = self

    def __call__(self) -> float:
        sums, round = self._run.sums._current, self._run.round
        if round.number < self._since:
            return time.monotonic()
        for group in sums._groups if sums else ():
            if group.step == VECTOR and group._answered[VECTOR] == set(MEMBERS) - {self._gone}:
                self._passed.add((round.number, VECTOR))
        if round.waiting_for == {self._gone}:
            self._passed.add((round.number, "all of it"))
        return time.monotonic() + 30.0 * len(self._passed)


def test_all_members_hold_the_branch_that_the_sums_make(federation: Any) -> None:
    coordinator, clients = federation(group_terms(rounds=6))
    assert not run(coordinator, clients)
    learners = [client.learner for client in clients.values()]
    first = learners[0]
    assert all(np.array_equal(learner.local, first.local) for learner in learners)
    assert first.local.mean() > 0.1, "the steps go where the examples pull"
    assert all(learner.personal == [6] for learner in learners)
    lines, exchanged = coordinator.last_words()
    assert exchanged, lines
    assert set(coordinator.summary()["received_rounds"].values()) == {5}
    clients["m00"].close()
    again = clients["m00"].session(in_process(coordinator, "m00"))
    again.run()
    assert clients["m00"].learner.personal == [], "a run that is over trains nothing again"
    _check_branch_of_sums_alone(coordinator, again, learners)
    # A second sum of a round, over a subset, would give away the rest: the difference is a few vectors.
    again._share(coordinator.run_id, 2)
    assert clients["m00"].learner.shares == {}, "nothing is drawn for it"
    grid = group_grid(first.terms, len(MEMBERS))
    for total in coordinator._run.sums._totals:
        plain = sum(learner.shares[total.round] for learner in learners)
        words = np.frombuffer(total.vectors[0], dtype="<i4")
        assert np.array_equal(words, plain), "the sum is of the shares that were drawn, exactly"
        assert grid.bits == 32
    for client in clients.values():
        rows = [row for row in client.ledger.export() if row.channel == "adapter"]
        assert [row.kind for row in rows] == ["RESERVED", "RELEASED"] * 5
        assert {row.event().noise_multiplier for row in rows if row.kind == "RESERVED"} == {SIGMA}


def _check_branch_of_sums_alone(coordinator: Any, session: Any, learners: list[PullingLearner]) -> None:
    """Fed with what a member knows beside the sums, steps or their state would carry its data on."""
    gradients = [mixed_gradient(session._sums_of(total), (1.0,)) for total in coordinator._run.sums._totals]
    theta = shared_branch(np.zeros(learners[0].local.size), gradients, 0.1, 5).astype(np.float32)
    assert all(np.array_equal(learner.branches[-1], theta) for learner in learners)


def test_a_member_that_is_killed_is_left_out_and_comes_back(federation: Any) -> None:
    coordinator, clients = federation(group_terms(rounds=5))
    sessions = {name: client.session(in_process(coordinator, name)) for name, client in clients.items()}
    clients["m03"].learner.dies_in = 3
    PassingTime(coordinator, "m03", since=3)
    errors = run_all(sessions)
    assert set(errors) == {"m03"}
    assert _contributors(coordinator)[2] == set(MEMBERS)
    assert _contributors(coordinator)[4] == set(MEMBERS) - {"m03"}
    clients["m03"].close()
    assert not run_all({"m03": clients["m03"].session(in_process(coordinator, "m03"))})
    assert np.array_equal(clients["m03"].learner.local, clients["m00"].learner.local), "made from the sums"


def _changing(coordinator: Any, client: str, stage: str, change: Callable[[bytes], bytes]) -> None:
    """Turn what a client sends of a stage into something else, as a client that lies would.

    In the first sum it is the first to send, so that what it sends is always looked at.
    """
    honest, sent = coordinator.post_key_message, threading.Event()

    def post(client_id: str, message: KeyMessage) -> None:
        if message.stage == stage and client_id != client and message.epoch == 2:
            assert sent.wait(120)
        if client_id == client and message.stage == stage:
            message = replace(message, payload=change(message.payload))
        honest(client_id, message)
        if client_id == client and message.stage == stage:
            sent.set()

    coordinator.post_key_message = post


def _contributors(coordinator: Any) -> dict[int, set[str]]:
    return {total.round: set(total.contributors[0]) for total in coordinator._run.sums._totals}


def test_whoever_gives_false_shares_is_left_out_of_later_sums_and_after_a_restart(
    federation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    coordinator, clients = federation(group_terms(rounds=4))
    # Shares are taken in the order of names, so those of the first member are among the first k.
    _changing(coordinator, "m00", "sum-unmask", lambda shares: bytes(15) + b"\1" + shares[16:])
    assert not run(coordinator, clients)
    assert _contributors(coordinator)[2] == set(MEMBERS), "the sum is made of the true shares"
    assert _contributors(coordinator)[3] == _contributors(coordinator)[4] == set(MEMBERS) - {"m00"}
    assert "m00 is left out of the sums from now on: it gave another share of 'm00'" in caplog.text
    assert "'m00' is left out of this run's sums" in caplog.text, "and it is told so"
    charged = {row.round for row in clients["m00"].ledger.export() if row.channel == "adapter"}
    assert charged == {2}, "a sum that it may not join costs it nothing"
    settings = coordinator.settings
    again = RunSums(settings, coordinator._run.store, coordinator._run.blobs, coordinator.run_id, 4)
    assert set(again._left_out()) == {"m00"}


def test_whoever_seals_damaged_envelopes_is_left_out_once_more_disagree_than_may_lie(federation: Any) -> None:
    coordinator, clients = federation(group_terms(rounds=4))
    # Each round one other envelope: no recipient can prove which of the two lies.
    place = iter((64 * 0, 64 * 1, 64 * 2))

    def damaged(envelopes: bytes) -> bytes:
        at = next(place)
        return envelopes[:at] + bytes(64) + envelopes[at + 64 :]

    _changing(coordinator, "m08", "sum-share", damaged)
    assert not run(coordinator, clients)
    found = _contributors(coordinator)
    assert found[2] == found[3] == set(MEMBERS), "a damaged envelope costs nobody its place"
    assert found[4] == set(MEMBERS) - {"m08"}


def test_groups_follow_the_profiles_and_mix_their_sums(federation: Any) -> None:
    agreed = group_terms(rounds=3, groups=2, minimum=4)
    members = tuple(f"m{number:02}" for number in range(8))
    coordinator, clients = federation(agreed, members)
    for number, client in enumerate(clients.values()):
        client.seed = number % 2
    assert not run(coordinator, clients)
    partition = coordinator._run.sums._partition
    assert partition.groups == (members[0::2], members[1::2])
    assert all(partition.mixing[name][number % 2] > 0.5 for number, name in enumerate(members))


def test_a_server_that_tells_one_member_other_sums_leaves_it_without_one(federation: Any) -> None:
    coordinator, clients = federation(group_terms(rounds=4))
    honest = coordinator.read_key_messages

    def lying(client: str, epoch: int, stage: str) -> dict[str, bytes]:
        found: dict[str, bytes] = honest(client, epoch, stage)
        if client == "m00" and stage == "sum-totals" and found:
            name, content = next(iter(found.items()))
            return {name: content[:-1] + bytes([content[-1] ^ 1])}
        return found

    coordinator.read_key_messages = lying
    assert not run(coordinator, clients)
    assert "m00" in _contributors(coordinator)[2]
    assert "m00" not in _contributors(coordinator)[3]


def test_too_few_members_form_no_sum_and_one_that_does_not_begin_costs_nothing(federation: Any) -> None:
    coordinator, clients = federation(group_terms(rounds=3, minimum=9))
    sessions = {name: client.session(in_process(coordinator, name)) for name, client in clients.items()}
    clients["m03"].learner.dies_in = 2
    PassingTime(coordinator, "m03", since=2)
    assert set(run_all(sessions)) == {"m03"}
    assert all(not any(total.vectors) for total in coordinator._run.sums._totals)
    lines, exchanged = coordinator.last_words()
    assert not exchanged
    assert "The log of every round says why." in lines[-1]
    first = clients["m00"].learner
    assert not first.local.any(), "no sum, no step"
    charged = {row.round for row in clients["m00"].ledger.export() if row.channel == "adapter"}
    assert charged == {2}, "in round 3 too few opened the sum, and nobody paid for it"
    assert first.personal == [3]
