"""Encrypted adapters in a federation larger than its rounds: all agree on the key, those drawn use it."""

import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from waiting import wait_until

from end_to_end import federation_of_vectors as fv
from end_to_end import test_faults as faults
from end_to_end import test_witness as witnesses
from fedmosaic.client.round import membership
from fedmosaic.privacy.audit import AUDIT, read_audit
from fedmosaic.privacy.federation.kits import WitnessEntry, open_kit
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.protos.messages import KeyMessage

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
        assert client.state is not None
        assert {path.name for path in (client.state.directory / "keys").iterdir()} <= {"counter.json"}
    check_sums(clients, summary["results"], TOLERANCE[backend])
    # One epoch for all rounds of its term, of all members that have a turn ahead.
    assert [result["key_epoch"] for result in summary["results"]] == [1, 1, 1, 2, 2, 2, 3, 3]
    ahead = {epoch: set().union(*(drawn[n] for n in drawn if n > TERM * (epoch - 1))) for epoch in (1, 2, 3)}
    assert {epoch: set(names) for epoch, names in holders(directory).items()} == ahead


@pytest.mark.slow
def test_a_witness_countersigns_what_is_made_for_those_drawn_next(tmp_path: Path) -> None:
    directory, roster = founded(tmp_path, "mask", witness=WitnessEntry(id="notary", seconds=240))
    clients = members_of(directory)
    with witnesses.serving(directory) as port, witnesses.witnessed(directory, port) as ended:
        lines = {name: fv.dial(directory, name, port, wait_seconds=2.0) for name in clients}
        try:
            assert fv.run_all({name: clients[name].session(line) for name, line in lines.items()}) == {}
        finally:
            for name, line in lines.items():
                clients[name].close()
                line.close()
    coordinator = fv.coordinator_of(directory)
    results: Any = coordinator.summary()["results"]
    drawn = turns(roster, coordinator.run_id)
    coordinator.close()
    assert [set(result["uploaded"]) for result in results] == list(drawn.values())
    assert ended == [(sum(len(result["received"]) for result in results[:-1]), 0)]
    check_sums(clients, results, TOLERANCE["mask"])


class Dying:
    """A transport whose process dies once it has posted a message of a key agreement."""

    def __init__(self, inner: Any, stage: str) -> None:
        self._inner, self._stage = inner, stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def post_key_message(self, message: KeyMessage) -> None:
        self._inner.post_key_message(message)
        if message.stage == self._stage:
            raise fv.Killed


@pytest.mark.parametrize("stage", ["join", "opening", "confirmation"])
def test_who_is_killed_in_an_agreement_of_others_still_gets_the_key(tmp_path: Path, stage: str) -> None:
    directory, roster = founded(tmp_path, "mask")
    coordinator, clients = fv.coordinator_of(directory), members_of(directory)
    drawn = turns(roster, coordinator.run_id)
    (idle, *_) = sorted(set().union(*drawn.values()) - drawn[1])

    def dies_and_comes_back() -> None:
        client = clients[idle]
        with pytest.raises(fv.Killed):
            client.session(Dying(fv.in_process(coordinator, idle), stage)).run()
        client.close()
        client.session(fv.in_process(coordinator, idle)).run()

    sessions: dict[str, Any] = {
        name: client.session(fv.in_process(coordinator, name))
        for name, client in clients.items()
        if name != idle
    }
    sessions[idle] = SimpleNamespace(run=dies_and_comes_back)
    assert fv.run_all(sessions) == {}
    summary: Any = coordinator.summary()
    coordinator.close()
    for client in clients.values():
        client.close()
    assert [set(result["uploaded"]) for result in summary["results"]] == list(drawn.values())
    assert all(idle in names for names in holders(directory).values() if idle in drawn[ROUNDS])


@pytest.fixture
def _no_process_is_left() -> Iterator[None]:
    yield
    while faults.STARTED:
        process = faults.STARTED.pop()
        process.kill()
        process.wait()


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("_no_process_is_left")
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mask", "ckks"])
def test_a_member_that_is_killed_while_others_are_drawn_holds_the_next_key(
    tmp_path: Path, backend: str
) -> None:
    """Over gRPC: it dies by SIGKILL in an agreement, the server after it; every sum is plain arithmetic."""
    patient = {"round_deadline_seconds": 240, "gathering_seconds": 240, "key_patience_seconds": 240}
    run = faults.Federation(tmp_path, backend, rounds=6, sampled_clients=4, rotate_key_every=2, **patient)
    wait_until(lambda: re.search(r"run [0-9a-f]{32} of", run.log.read_text()))
    (run_id,) = re.findall(r"run ([0-9a-f]{32}) of", run.log.read_text())
    roster = open_kit(run.directory / "server").roster
    (idle,) = set(fv.MEMBERS) - roster.taking_part(run_id, 3)  # in which a new key is due
    dying = run.start_client(idle, "kill-idle")
    clients = {name: run.in_thread(name) for name in fv.MEMBERS if name != idle}
    assert dying.wait(faults.PATIENCE) == -signal.SIGKILL
    run.server.kill()
    run.server.wait()
    run.server = run.start_server()
    clients[idle] = run.in_thread(idle)
    assert {name: client.result(faults.PATIENCE) for name, client in clients.items()} == dict.fromkeys(
        fv.MEMBERS, 0
    )
    run.stop()
    results: Any = run.summary()["results"]
    assert [set(result["uploaded"]) for result in results] == [
        roster.taking_part(run_id, number) for number in range(1, 7)
    ]
    first, *_, last = (result["key_epoch"] for result in results)
    assert last >= first + 2
    expected = plain_adapters(results, roster)
    for name in fv.MEMBERS:
        (place,) = (run.directory / "clients" / name / "state/adapter").glob("round-*/vector.npz")
        with np.load(place) as stored:
            np.testing.assert_allclose(stored["local"], expected[name], atol=TOLERANCE[backend])


def plain_adapters(results: list[dict[str, Any]], roster: Roster) -> dict[str, np.ndarray]:
    """What each member is left with where the rows of a run are applied to adapters in the clear."""
    size = roster.terms.adapter.shared_dimensions
    local = {name: np.zeros(size) for name in fv.MEMBERS}
    rows: dict[str, dict[str, float]] = {}
    for result in results:
        before = dict(local)
        for name in result["uploaded"]:
            row, own = rows.get(name), before[name]
            received = own if row is None else sum(share * before[other] for other, share in row.items())
            step = np.random.default_rng([fv.MEMBERS.index(name), result["round"]]).normal(0, 0.5, size)
            local[name] = 0.5 * own + 0.25 * received + step
        rows = result["weights"]["shared"]
    return local
