"""Encrypted adapters in a federation larger than its rounds: all agree on the key, those drawn use it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from end_to_end import federation_of_vectors as fv
from fedmosaic.client.round import membership
from fedmosaic.privacy.audit import AUDIT, read_audit
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.privacy.federation.roster import Roster

MEMBERS = tuple(f"m{number}" for number in range(9))
ROUNDS, EACH, TERM = 8, 4, 3
TOLERANCE = {"mask": 1e-4, "ckks": 1e-5}


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_SECONDS_BETWEEN_EPOCHS", 0.1)


@dataclass
class Remembering(fv.VectorLearner):
    """Keeps what it shared in each round."""

    shared: dict[int, np.ndarray] = field(default_factory=dict)

    def train(self, round_number: int, releases: Any, give_up: Callable[[], None]) -> None:
        super().train(round_number, releases, give_up)
        self.shared[round_number] = self.local


class Member(fv.Client):
    def make_learner(self, agreed: Any) -> Remembering:
        return Remembering(self.seed, agreed)


def founded(place: Path, backend: str, **more: Any) -> tuple[Path, Roster]:
    agreed = fv.terms(backend, ROUNDS, sampled_clients=EACH, rotate_key_every=TERM)
    directory = fv.make_federation(place / "f", agreed, MEMBERS, **more)
    return directory, open_kit(directory / "server").roster


def members_of(directory: Path) -> dict[str, Member]:
    return {name: Member(directory, name, seed) for seed, name in enumerate(MEMBERS)}


def turns(roster: Roster, run_id: str) -> dict[int, frozenset[str]]:
    return {number: roster.taking_part(run_id, number) for number in range(1, ROUNDS + 1)}


def holders(directory: Path) -> dict[int, list[str]]:
    """Members of each key epoch, as the server saw it."""
    lines, _ = read_audit(directory / "server/state" / AUDIT)
    return {line.fields["epoch"]: line.fields["members"] for line in lines if line.event == "key-epoch"}


def check_sums(clients: dict[str, Member], results: list[dict[str, Any]], tolerance: float) -> None:
    """Everything that was decrypted is the plain weighted sum of what was shared."""
    expected: dict[str, list[np.ndarray]] = {name: [] for name in clients}
    for result in results[:-1]:
        for name, row in result["weights"]["shared"].items():
            shared = {n: clients[n].learner.shared[result["round"]] for n in row}
            expected[name].append(sum(share * shared[n].astype(np.float64) for n, share in row.items()))
    assert sum(map(len, expected.values())) > ROUNDS
    for name, client in clients.items():
        for received, plain in zip(client.learner.received, expected[name], strict=True):
            np.testing.assert_allclose(received, plain, atol=tolerance)


@pytest.mark.parametrize("backend", ["mask", "ckks"])
def test_those_drawn_open_what_those_before_them_sealed(tmp_path: Path, backend: str) -> None:
    directory, roster = founded(tmp_path, backend)
    coordinator, clients = fv.coordinator_of(directory), members_of(directory)
    assert fv.play(coordinator, clients) == {}
    summary: Any = coordinator.summary()
    drawn = turns(roster, coordinator.run_id)
    coordinator.close()
    assert [set(result["uploaded"]) for result in summary["results"]] == list(drawn.values())
    for name, client in clients.items():
        assert client.learner.trained == [number for number, names in drawn.items() if name in names]
        assert [path.name for path in (client.state.directory / "keys").iterdir()] == ["counter.json"]
    check_sums(clients, summary["results"], TOLERANCE[backend])
    # One epoch for all rounds of its term, of all members that have a turn ahead.
    assert [result["key_epoch"] for result in summary["results"]] == [1, 1, 1, 2, 2, 2, 3, 3]
    ahead = {epoch: set().union(*(drawn[n] for n in drawn if n > TERM * (epoch - 1))) for epoch in (1, 2, 3)}
    assert {epoch: set(names) for epoch, names in holders(directory).items()} == ahead
