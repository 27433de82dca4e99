"""A server that hands out something else than it should: refused by the client, by name, and told nobody."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from end_to_end import federation_of_vectors as fv
from fedmosaic.client.state import ClientState
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.protos.errors import PolicyError
from fedmosaic.protos.messages import Aggregate, AggregateSection, WeightRow
from fedmosaic.server.coordinator import Coordinator

Change = Callable[[AggregateSection], AggregateSection]
VICTIM = "ada"


def with_payload(change: Callable[[bytearray], object]) -> Change:
    def changed(section: AggregateSection) -> AggregateSection:
        payload = bytearray(section.payload)
        change(payload)
        return replace(section, payload=bytes(payload))

    return changed


def with_row(change: Callable[[WeightRow], WeightRow]) -> Change:
    def changed(section: AggregateSection) -> AggregateSection:
        assert section.row is not None
        return replace(section, row=change(section.row))

    return changed


def flip(position: int) -> Change:
    def change(payload: bytearray) -> None:
        payload[position] ^= 0x80

    return with_payload(change)


def one_hot(row: WeightRow) -> WeightRow:
    return replace(row, weights=(1 << row.bits,) + (0,) * (len(row.weights) - 1))


def over_the_cap(row: WeightRow) -> WeightRow:
    total = 1 << row.bits
    rest = len(row.weights) - 1
    small = total // 4 // rest
    return replace(row, weights=(total - rest * small, *[small] * rest))


def other_weights(row: WeightRow) -> WeightRow:
    first, second, *rest = row.weights
    return replace(row, weights=(first - 1, second + 1, *rest))


def with_contributor(name: str) -> Change:
    return with_row(lambda row: replace(row, contributors=(name, *row.contributors[1:])))


ATTACKS: dict[str, tuple[Change, str]] = {
    "altered word": (flip(-1), "decrypts outside ±4"),
    "altered header": (flip(40), "has a different"),
    "nothing": (with_payload(lambda payload: payload.clear()), "record has 0 bytes"),
    "cut short": (with_payload(lambda payload: payload.pop()), "record has"),
    "longer": (with_payload(lambda payload: payload.append(0)), "record has"),
    "one-hot row": (with_row(one_hot), "1 contributors other than the recipient, at least 3 are required"),
    "share above the cap": (with_row(over_the_cap), "above the cap of 0.5"),
    "another row": (with_row(other_weights), "made with another weight row"),
    "a contributor who is no member": (with_contributor("mallory"), "outside the roster: mallory"),
    "the recipient itself": (with_contributor(VICTIM), "weighted in its own row"),
}


class HostileCoordinator:
    """Alters what one client receives in round 2; everything else goes to the real one."""

    def __init__(self, inner: Coordinator, change: Change) -> None:
        self._inner, self._change = inner, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def pull(self, client: str, round_number: int) -> Aggregate | None:
        answer = self._inner.pull(client, round_number)
        if answer is None or client != VICTIM or answer.round != 2:
            return answer
        return replace(answer, sections=tuple(self._change(section) for section in answer.sections))


def run_with(
    directory: Path, backend: str, change: Change, rounds: int = 2
) -> tuple[dict[str, fv.Client], Any, list[str]]:
    """Run a federation; returns the clients, the summary, and every call that the victim made."""
    fv.make_federation(directory, fv.terms(backend, rounds))
    coordinator = fv.coordinator_of(directory)
    calls: list[str] = []
    clients = fv.clients_of(directory)
    lines = {VICTIM: lambda line: fv.Listed(line, calls)}
    assert fv.play(HostileCoordinator(coordinator, change), clients, lines) == {}
    summary = coordinator.summary()
    coordinator.close()
    return clients, summary, calls


CASES = [("mask", attack) for attack in ATTACKS] + [
    ("ckks", attack)
    for attack in ("altered word", "altered header", "cut short", "one-hot row", "another row")
]


@pytest.mark.parametrize(("backend", "attack"), CASES)
def test_what_is_not_the_agreed_aggregate_is_refused_and_reported_at_home(
    tmp_path: Path, backend: str, attack: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, message = ATTACKS[attack]
    caplog.set_level(logging.WARNING, "fedmosaic.client.round.session")
    clients, summary, calls = run_with(tmp_path / "f", backend, change)
    refusals = [line for line in caplog.messages if "no shared aggregate" in line]
    assert len(refusals) == 1
    assert refusals[0].startswith("round 2: no shared aggregate: ")
    assert message in refusals[0]
    # The victim trained alone and shared as always: the server sees no difference, so it learns nothing
    # about the key from what decrypts and what does not.
    assert clients[VICTIM].learner.received == []
    assert all(len(c.learner.received) == 1 for name, c in clients.items() if name != VICTIM)
    first, second = (call.split(maxsplit=2) for call in calls if call.startswith("push"))
    assert (first[1], second[1], first[2]) == ("1", "2", second[2])
    assert not [call for call in calls if call.startswith("report")]
    assert [result["uploaded"] for result in summary["results"]] == [sorted(fv.MEMBERS)] * 2


FAMILIES = {"ada": "llama", "ben": "llama", "cid": "llama", "dee": "llama", "eva": "qwen"}
FAMILY_SIZE = 7


class FamilyLearner(fv.VectorLearner):
    """Shares a second vector with its family: its seed in every place."""

    def sections(self) -> dict[str, np.ndarray]:
        own = np.full(FAMILY_SIZE, self.seed / 8, dtype=np.float32)
        return {"shared": self.local.copy(), "family": own}

    def load_global(self, section: str, vector: np.ndarray) -> None:
        self.received.append((section, vector))


class FamilyClient(fv.Client):
    def make_learner(self, agreed: Terms) -> FamilyLearner:
        return FamilyLearner(self.seed, agreed, family=FAMILIES[self.name])


def run_families(
    directory: Path, change: Change = lambda section: section, altered: str = "family"
) -> tuple[dict[str, FamilyClient], Any]:
    terms = fv.terms("mask", 2)
    adapter = terms.adapter.model_copy(
        update={"family_dimensions": {"llama": FAMILY_SIZE, "qwen": FAMILY_SIZE}}
    )
    fv.make_federation(directory, terms.model_copy(update={"adapter": adapter}), families=FAMILIES)
    clients, summary = fv.finish(
        directory,
        FamilyClient,
        lambda inner: HostileCoordinator(inner, lambda s: change(s) if s.name == altered else s),
    )
    return clients, summary


def test_families_share_under_the_same_policy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Four of one family receive each other's sums; one alone receives nothing, and is told why."""
    caplog.set_level(logging.WARNING, "fedmosaic.client.round.session")
    clients, summary = run_families(tmp_path / "f")
    kin = set(fv.MEMBERS[:4])
    weights = summary["results"][0]["weights"]["shared"]
    assert {name: set(row) for name, row in weights.items()} == {name: kin - {name} for name in kin}
    for seed, name in enumerate(fv.MEMBERS[:4]):
        received = dict(clients[name].learner.received)["family"]
        others = [other / 8 for other in range(4) if other != seed]
        assert min(others) < received.min() <= received.max() < max(others)
        assert np.ptp(received) < 1e-9
    assert clients["eva"].learner.received == []
    for section in ("family", "shared"):
        (refusal,) = [line for line in caplog.messages if f"no {section} aggregate" in line]
        assert "0 contributors other than the recipient, at least 3 are required" in refusal


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("family", with_contributor("eva"), "weight row of family 'llama' names members of others: eva"),
        ("shared", with_contributor("eva"), "weight row of family 'llama' names members of others: eva"),
        ("family", with_row(one_hot), "1 contributors other than the recipient, at least 3 are required"),
    ],
)
def test_a_family_of_fewer_than_it_seems_is_refused(
    tmp_path: Path, section: str, change: Change, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fedmosaic.client.round.session")
    clients, _ = run_families(tmp_path / "f", change, section)
    assert [name for name, _ in clients[VICTIM].learner.received] == [
        name for name in ("shared", "family") if name != section
    ]
    assert any(f"no {section} aggregate" in line and message in line for line in caplog.messages)
    assert len(clients["ben"].learner.received) == 2


def test_a_server_that_wants_more_rounds_than_were_signed_gets_nothing(tmp_path: Path) -> None:
    directory = fv.make_federation(tmp_path / "f", fv.terms("plain", rounds=2))
    greedy = fv.coordinator_of(directory, rounds=7)
    clients = fv.clients_of(directory)
    errors = fv.play(greedy, clients)
    assert set(errors) == set(fv.MEMBERS)
    for error in errors.values():
        assert isinstance(error, PolicyError)
        assert "runs 7 rounds, the signed terms say 2" in str(error)
    assert greedy.summary()["results"] == []
    assert all(client.learner.trained == [] for client in clients.values())
    greedy.close()


def test_a_second_row_for_one_round_is_refused(tmp_path: Path) -> None:
    """Asked again after a restart, a client gives no second equation in the single adapters."""
    run_with(tmp_path / "f", "mask", lambda section: section)
    directory = tmp_path / "f" / "clients" / VICTIM / "state"
    state = ClientState(directory, "vectors", VICTIM)
    row = WeightRow(("ben", "cid", "dee"), (2048, 1024, 1024), 12)
    with pytest.raises(PolicyError, match=r"a different weight row .* was already accepted for round 1"):
        state.accept_row("shared", 1, row)
    state.accept_row("family", 1, row)
    state.accept_row("family", 1, row)
    state.release()
