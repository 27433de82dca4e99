"""Clients killed between two durable steps, servers that lose or forget: the run goes on, or says why not."""

import logging
import shutil
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from end_to_end import federation_of_vectors as fv
from fedmosaic.client.round.keyring import Keyring
from fedmosaic.client.round.records import read_upload
from fedmosaic.protos.errors import KeyAgreementError, StateError
from fedmosaic.protos.messages import KeyMessage, ReceiptStatus, Upload
from fedmosaic.server.coordinator import Coordinator


def uploaded(coordinator: Coordinator) -> list[list[str]]:
    results: Any = coordinator.summary()["results"]
    return [result["uploaded"] for result in results]


def _dies_before_its_key_is_confirmed(session: Any) -> None:
    def store(_agreed: object) -> None:
        raise fv.Killed

    session._protection._keyring._store = store


class DyingInTheAgreement(fv.Dying):
    """A transport whose process dies after its opening of the key agreement."""

    def post_key_message(self, message: KeyMessage) -> None:
        self._inner.post_key_message(message)
        if message.stage == "opening":
            raise fv.Killed


@pytest.mark.parametrize(
    ("killed", "line", "prepare", "epoch"),
    [
        (("ada", "ben"), lambda inner: inner, _dies_before_its_key_is_confirmed, 1),
        (("ada",), DyingInTheAgreement, lambda session: None, 2),
    ],
    ids=["after its confirmation it is in the epoch", "before it held the key it asks for another"],
)
def test_a_client_killed_in_the_key_agreement_comes_back(
    founded: Any, killed: tuple[str, ...], line: Any, prepare: Any, epoch: int
) -> None:
    directory, coordinator = founded("mask", 2)
    fv.played(directory, coordinator, killed, line, prepare)
    assert uploaded(coordinator) == [sorted(fv.MEMBERS)] * 2
    assert coordinator._run.keys.epoch == epoch


def test_a_key_that_is_not_confirmed_by_all_encrypts_nothing(founded: Any) -> None:
    directory, coordinator = founded("mask", 1)
    clients = fv.clients_of(directory)
    keyrings: dict[str, Keyring] = {}
    others = threading.Barrier(len(clients) - 1)
    for name, client in clients.items():
        session = client.session(fv.in_process(coordinator, name))
        session._enrol()
        keyring: Any = session._protection._keyring
        keyrings[name] = keyring
        confirm = keyring._confirm

        def killed(agreed: Any, confirmation: bytes, name: str = name, confirm: Any = confirm) -> None:
            if name == "ada":
                raise fv.Killed
            # The others confirm at once and wait for ada, and not for long; the model is frozen.
            others.wait(120)
            keyrings[name]._roster.terms.schedule.__dict__["key_patience_seconds"] = 1.0
            confirm(agreed, confirmation)

        keyring._confirm = killed

    errors = fv.run_all({n: SimpleNamespace(run=partial(keyrings[n].agree, 1, 1)) for n in clients})
    assert isinstance(errors.pop("ada"), fv.Killed)
    for name, error in errors.items():
        assert isinstance(error, KeyAgreementError)
        assert "confirmations of members are missing: ada" in str(error)
        assert (directory / "clients" / name / "state" / "keys" / "epoch-unconfirmed.json").exists()
        assert not keyrings[name].has(1)
        with pytest.raises(KeyAgreementError):
            keyrings[name].encryption_key(1, 1)
    for client in clients.values():
        client.close()


def test_what_was_trained_and_sent_before_a_kill_is_gone_on_from(founded: Any) -> None:
    """fv.Killed after the receipt of round 1, back in round 2: that begins from the adapter of round 1."""
    directory, coordinator = founded("mask", 2, quorum=4, round_deadline_seconds=60)
    before: dict[str, Any] = {}

    def remember(session: Any) -> None:
        train = session._learner.train

        def training(number: int, releases: Any, give_up: Any) -> None:
            train(number, releases, give_up)
            before["local"] = session._learner.local.copy()

        session._learner.train = training

    loaded: list[Any] = []
    load = fv.VectorLearner.load

    def loading(self: Any, place: Path) -> None:
        load(self, place)
        if self.seed == 0:
            loaded.append(self.local.copy())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fv.VectorLearner, "load", loading)
        clients = fv.played(
            directory,
            coordinator,
            ("ada",),
            lambda inner: fv.Dying(inner, pushed=1),
            remember,
            lambda: fv.in_process(coordinator, "ada").pull(2),
        )
    assert uploaded(coordinator) == [sorted(fv.MEMBERS)] * 2
    assert clients["ada"].learner.trained == [2]
    assert (loaded[-1] == before["local"]).all()
    assert not list((directory / "clients" / "ada" / "state").glob("upload-*.bin"))


def test_an_upload_that_the_server_lost_is_sent_again(founded: Any, caplog: pytest.LogCaptureFixture) -> None:
    directory, coordinator = founded("mask", 3)
    adopt, damaged = coordinator._run.blobs.adopt, list[str]()

    def damaging(spooled: Path, round_number: int, client: str) -> None:
        adopt(spooled, round_number, client)
        if (client, round_number) == ("ben", 2) and not damaged:
            damaged.append(client)
            path = coordinator._run.blobs.path("uploads", round_number, client)
            path.write_bytes(path.read_bytes()[:-1] + b"\x00")

    coordinator._run.blobs.adopt = damaging  # a disk that fails once
    clients = fv.played(directory, coordinator)
    assert damaged == ["ben"]
    assert uploaded(coordinator) == [sorted(fv.MEMBERS)] * 3
    assert clients["ben"].learner.trained == [1, 2, 3], "nothing was trained or released again"
    assert "the server has lost our upload" in caplog.text


def test_a_server_that_forgot_uploads_and_their_key_epoch_gets_them_under_another(tmp_path: Path) -> None:
    """Its database is of a moment before, in the same round: no head can show that, and all go on."""
    directory = fv.make_federation(tmp_path / "f", fv.terms("mask", 2))
    state, copy = directory / "server" / "state", tmp_path / "copy"
    coordinator = fv.coordinator_of(directory)
    coordinator.close()
    shutil.copytree(state, copy)
    coordinator = fv.coordinator_of(directory)
    lines = dict.fromkeys(fv.MEMBERS, lambda line: fv.Dying(line, pull=2))
    lines["eva"] = lambda line: fv.Dying(line, push=1)
    errors = fv.play(coordinator, fv.clients_of(directory), lines)
    assert {type(error) for error in errors.values()} == {fv.Killed}
    coordinator.close()
    shutil.rmtree(state)
    shutil.copytree(copy, state)
    coordinator = fv.coordinator_of(directory)
    clients = fv.played(directory, coordinator)
    assert uploaded(coordinator) == [sorted(fv.MEMBERS)] * 2
    assert all(client.learner.trained == [2] for client in clients.values()), "round 1 was trained once"
    assert set(coordinator._run.store.profiles()) == set(fv.MEMBERS), "and what it went with is there again"
    coordinator.close()


def test_an_older_copy_of_the_server_is_noticed(tmp_path: Path) -> None:
    """While a client waits, at its push, and at its start."""
    directory = fv.make_federation(tmp_path / "f", fv.terms("plain", 3))
    state, copy = directory / "server" / "state", tmp_path / "copy"
    coordinator = fv.coordinator_of(directory)

    for number in (2, 3):
        lines = dict.fromkeys(fv.MEMBERS, lambda line, number=number: fv.Dying(line, push=number))
        errors = fv.play(coordinator, fv.clients_of(directory), lines)
        assert {type(error) for error in errors.values()} == {fv.Killed}
        if number == 2:
            coordinator.close()
            shutil.copytree(state, copy)
            coordinator = fv.coordinator_of(directory)
    client = fv.Client(directory, "ada", 0)
    line: Any = fv.in_process(coordinator, "ada")
    session = client.session(line)
    enrolled = session._enrol()
    session._resume(enrolled)
    upload = read_upload(session._state.upload_path(3))
    assert upload is not None
    coordinator.close()
    shutil.rmtree(state)
    shutil.copytree(copy, state)
    older = fv.coordinator_of(directory)
    line._coordinator = older
    for call in (partial(session._pull, 3), partial(session._push, upload), session.run):
        with pytest.raises(StateError, match=r"is at round 2, but was at round 3 before.*older copy"):
            call()
    older.close()
    client.close()


def test_a_run_that_brought_nothing_is_known_at_the_members_and_at_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    terms = fv.terms("plain", 2, quorum=3, round_deadline_seconds=1)
    directory = fv.make_federation(tmp_path / "f", terms)
    coordinator = fv.coordinator_of(directory)
    clients = fv.clients_of(directory, ("ada", "ben", "cid"))
    assert fv.play(coordinator, clients) == {}
    for client in clients.values():
        state: Any = client.state
        assert state.record.completed_round == 2
        assert state.record.received_rounds == 0
    lines, exchanged = coordinator.last_words()
    assert not exchanged
    assert "NOTHING WAS EXCHANGED" in lines[-1]
    assert "at least 3 are required" in lines[-1]
    received: Any = coordinator.summary()["received_rounds"]
    assert set(received.values()) == {0}
    coordinator.close()


def test_receipts_of_a_round_that_is_over_are_asked_for(founded: Any) -> None:
    """An upload that was never acknowledged and whose round closed without it: late, and gone on from."""
    directory, coordinator = founded("plain", 2, quorum=4, round_deadline_seconds=1)
    statuses: list[ReceiptStatus] = []

    push = coordinator.push

    def noting(client: str, upload: Upload) -> Any:
        receipt = push(client, upload)
        if client == "ada":
            statuses.append(receipt.status)
        return receipt

    coordinator.push = noting  # to see the answers
    clients = fv.played(
        directory,
        coordinator,
        ("ada",),
        lambda inner: fv.Dying(inner, push=1),
        pause=lambda: fv.in_process(coordinator, "ben").pull(2),
    )
    assert statuses[0] is ReceiptStatus.LATE
    assert clients["ada"].learner.trained in ([2], [])
