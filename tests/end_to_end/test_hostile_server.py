"""A server that hands out something else than it should: refused by the client, by name, and told nobody."""

import logging
from collections.abc import Callable, Mapping
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
    """Alters what one client receives in some rounds; everything else goes to the real one."""

    def __init__(self, inner: Coordinator, changes: Mapping[int, Change]) -> None:
        self._inner, self._changes = inner, changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def pull(self, client: str, round_number: int) -> Aggregate | None:
        answer = self._inner.pull(client, round_number)
        if answer is None or client != VICTIM or answer.round not in self._changes:
            return answer
        changed = map(self._changes[answer.round], answer.sections)
        return replace(answer, sections=tuple(changed))


@pytest.mark.parametrize(
    ("backend", "attacks"),
    [
        ("mask", tuple(ATTACKS)),
        ("ckks", ("altered word", "altered header", "cut short", "one-hot row", "another row")),
    ],
)
def test_what_is_not_the_agreed_aggregate_is_refused_and_reported_at_home(
    tmp_path: Path, backend: str, attacks: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """In every round from the second another attack on the same client."""
    caplog.set_level(logging.WARNING, "fedmosaic.client.round.session")
    rounds = len(attacks) + 1
    directory = fv.make_federation(tmp_path / "f", fv.terms(backend, rounds))
    coordinator = fv.coordinator_of(directory)
    hostile = HostileCoordinator(coordinator, {n: ATTACKS[name][0] for n, name in enumerate(attacks, 2)})
    calls: list[str] = []
    clients = fv.clients_of(directory)
    assert fv.play(hostile, clients, {VICTIM: lambda line: fv.Listed(line, calls)}) == {}
    summary: Any = coordinator.summary()
    coordinator.close()
    refusals = [line for line in caplog.messages if "no shared aggregate" in line]
    assert len(refusals) == len(attacks)
    for number, (name, refusal) in enumerate(zip(attacks, refusals, strict=True), 2):
        assert refusal.startswith(f"round {number}: no shared aggregate: "), name
        assert ATTACKS[name][1] in refusal, name
    # The victim trained alone and shared as always: the server sees no difference, so it learns nothing
    # about the key from what decrypts and what does not.
    assert clients[VICTIM].learner.received == []
    assert all(len(c.learner.received) == len(attacks) for n, c in clients.items() if n != VICTIM)
    pushes = [call.split(maxsplit=2)[1:] for call in calls if call.startswith("push")]
    assert pushes == [[str(number), pushes[0][1]] for number in range(1, rounds + 1)]
    assert not [call for call in calls if call.startswith("report")]
    assert [result["uploaded"] for result in summary["results"]] == [sorted(fv.MEMBERS)] * rounds


FAMILIES = {"ada": "llama", "ben": "llama", "cid": "llama", "dee": "llama", "eva": "qwen"}
FAMILY_SIZE = 7


class FamilyLearner(fv.VectorLearner):
    """Shares a second vector with its family: its seed in every place."""

    received: list[Any]

    def sections(self) -> dict[str, np.ndarray]:
        own = np.full(FAMILY_SIZE, self.seed / 8, dtype=np.float32)
        return {"shared": self.local.copy(), "family": own}

    def load_global(self, section: str, vector: np.ndarray) -> None:
        self.received.append((section, vector))


class FamilyClient(fv.Client):
    def make_learner(self, agreed: Terms) -> FamilyLearner:
        return FamilyLearner(self.seed, agreed, family=FAMILIES[self.name])


FALSE_FAMILIES: dict[int, tuple[str, Change, str]] = {
    3: ("family", with_contributor("eva"), "weight row of family 'llama' names members of others: eva"),
    4: ("shared", with_contributor("eva"), "weight row of family 'llama' names members of others: eva"),
    5: ("family", with_row(one_hot), "1 contributors other than the recipient, at least 3 are required"),
}


def test_families_share_under_the_same_policy_and_are_no_smaller_than_they_seem(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Four of one family receive each other's sums; one alone receives nothing, and is told why.

    From round 3 a family is made out to be smaller than it is.
    """
    caplog.set_level(logging.WARNING, "fedmosaic.client.round.session")
    terms = fv.terms("mask", 5)
    sizes = {"family_dimensions": {"llama": FAMILY_SIZE, "qwen": FAMILY_SIZE}}
    terms = terms.model_copy(update={"adapter": terms.adapter.model_copy(update=sizes)})
    directory = fv.make_federation(tmp_path / "f", terms, families=FAMILIES)
    changes = {
        number: lambda section, name=name, change=change: change(section) if section.name == name else section
        for number, (name, change, _) in FALSE_FAMILIES.items()
    }
    clients, summary = fv.finish(directory, FamilyClient, lambda inner: HostileCoordinator(inner, changes))
    kin = set(fv.MEMBERS[:4])
    weights = summary["results"][0]["weights"]["shared"]
    assert {name: set(row) for name, row in weights.items()} == {name: kin - {name} for name in kin}
    for seed, name in enumerate(fv.MEMBERS[:4]):
        received = dict(reversed(clients[name].learner.received))["family"]
        others = [other / 8 for other in range(4) if other != seed]
        assert min(others) < received.min() <= received.max() < max(others)
        assert np.ptp(received) < 1e-9
    assert clients["eva"].learner.received == []
    for section in ("family", "shared"):
        alone, *_ = [line for line in caplog.messages if f"round 2: no {section} aggregate" in line]
        assert "0 contributors other than the recipient, at least 3 are required" in alone
    both = ["shared", "family"]
    taken = both + [name for false, _, _ in FALSE_FAMILIES.values() for name in both if name != false]
    assert [name for name, _ in clients[VICTIM].learner.received] == taken
    for number, (name, _, words) in FALSE_FAMILIES.items():
        told = [line for line in caplog.messages if f"round {number}: no {name} aggregate" in line]
        assert any(words in line for line in told), told
    assert [name for name, _ in clients["ben"].learner.received] == both * 4
    _no_second_row_is_accepted(directory / "clients" / VICTIM / "state")


def _no_second_row_is_accepted(directory: Path) -> None:
    """Asked again after a restart, a client gives no second equation in the single adapters."""
    state = ClientState(directory, "vectors", VICTIM)
    row = WeightRow(("ben", "cid", "dee"), (2048, 1024, 1024), 12)
    with pytest.raises(PolicyError, match=r"a different weight row .* was already accepted for round 1"):
        state.accept_row("shared", 1, row)
    for _ in range(2):
        state.accept_row("shared", 9, row)
    state.release()


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
