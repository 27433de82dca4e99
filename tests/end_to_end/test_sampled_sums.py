"""Group sums of those drawn: the others wait, and all take the steps that the sums stand for."""

from collections import Counter
from typing import Any

import numpy as np

from end_to_end import federation_of_vectors as fv
from end_to_end import test_group_sums as sums
from end_to_end.test_group_sums import group_terms, run
from fedmosaic.client.planning import group_grid
from fedmosaic.client.round.group_steps import GroupSum, mixed_gradient, shared_branch
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.secureaggregation.partition import RoundTotals

ROUNDS = 6
TWELVE = tuple(f"m{number:02}" for number in range(12))
NINE = TWELVE[:9]
federation = sums.federation


def _drawn(coordinator: Any, number: int) -> tuple[tuple[str, ...], ...]:
    partition, roster = coordinator._run.sums._partition, coordinator.settings.roster
    groups: tuple[tuple[str, ...], ...] = partition.drawn(roster, coordinator.run_id, number).groups
    return groups


def _rounds_charged(client: Any) -> list[int]:
    return [
        row.round for row in client.ledger.export() if row.channel == "adapter" and row.kind == "RESERVED"
    ]


def test_of_groups_larger_than_a_round_those_drawn_add_up_and_all_take_the_steps(federation: Any) -> None:
    """Twelve members in two groups of six, three of each in a round: every member in every other round."""
    agreed = group_terms(ROUNDS, groups=2, minimum=3, sampled=6)
    coordinator, clients = federation(agreed, TWELVE)
    for number, client in enumerate(clients.values()):
        client.seed = number % 2
    assert not run(coordinator, clients)
    totals = {total.round: total for total in coordinator._run.sums._totals}
    assert coordinator._run.sums._partition.groups == (TWELVE[0::2], TWELVE[1::2])
    for number in range(2, ROUNDS + 1):
        assert tuple(map(len, _drawn(coordinator, number))) == (3, 3)
        assert totals[number].contributors == _drawn(coordinator, number)
    turns = Counter(number for client in clients.values() for number in _rounds_charged(client))
    assert turns == dict.fromkeys(range(2, ROUNDS + 1), 6), "whoever was not drawn paid for nothing"
    most = agreed.schedule.turns(len(TWELVE))
    assert most == 3
    for name, client in clients.items():
        assert len(_rounds_charged(client)) <= most
        assert set(client.learner.shares) == {
            n for n in totals if any(name in g for g in _drawn(coordinator, n))
        }
        assert client.learner.personal == [ROUNDS]
        assert client.state.record.received_rounds == ROUNDS - 1
        partition = coordinator._run.sums._partition
        gradients = [
            mixed_gradient(_sums_of(total, agreed), partition.mixing[name]) for total in totals.values()
        ]
        branch = shared_branch(np.zeros(client.learner.local.size), gradients, 0.1, ROUNDS - 1)
        assert np.array_equal(client.learner.local, branch.astype(np.float32)), name
    assert set(coordinator.summary()["received_rounds"].values()) == {ROUNDS - 1}


def _sums_of(total: RoundTotals, agreed: Terms) -> list[GroupSum]:
    """What the packed words of a round stand for, from the definition of the grid."""
    grid = group_grid(agreed, 3)
    words = (np.frombuffer(vector, dtype="<i4") * (1.0 / grid.steps) for vector in total.vectors)
    return [GroupSum(vector, 3.0 * 10) for vector in words]


def test_a_server_and_members_that_are_started_again_go_on_with_those_drawn(federation: Any) -> None:
    """Their round has no sum then, as without sampling; the next one has."""
    coordinator, clients = federation(group_terms(4, minimum=3, sampled=4), NINE)
    lines = {name: fv.Dying(fv.in_process(coordinator, name), pull=2) for name in NINE}
    died = fv.run_all({name: client.session(lines[name]) for name, client in clients.items()})
    assert set(died) == set(NINE), "each as it asks for the groups"
    assert coordinator._run.round.number == 2
    coordinator.close()
    again: Any = fv.coordinator_of(clients["m00"].directory)
    try:
        (drawn,) = _drawn(again, 2)
        assert again._run.round.waiting_for == again.taking_part(2) == frozenset(drawn)
        assert again.taking_part(1) == frozenset(NINE), "also where it stopped before the round was closed"
        assert f"0 of 4 uploads, waiting for {', '.join(drawn)}" in again.describe().message
        for client in clients.values():
            client.close()
        assert not run(again, clients)
        assert [total.contributors for total in again._run.sums._totals] == [
            ((),),
            *(_drawn(again, number) for number in (3, 4)),
        ]
        branches = [client.learner.local for client in clients.values()]
        assert branches[0].any()
        assert all(np.array_equal(branch, branches[0]) for branch in branches)
        assert {client.state.record.received_rounds for client in clients.values()} == {2}
    finally:
        again.close()
