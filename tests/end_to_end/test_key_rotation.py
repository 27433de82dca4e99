"""When a group key must change: clients count for themselves, whatever the server announces."""

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import builders
from end_to_end import federation_of_vectors as fv
from fedmosaic.client.round import membership
from fedmosaic.client.round.keyring import Keyring
from fedmosaic.privacy.federation import consortium
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.protos.errors import KeyAgreementError, KeyExpiredError, StateError


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_SECONDS_BETWEEN_EPOCHS", 0.1)


@pytest.fixture
def _stopped_before_the_keys_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients whose process ends after the last round and before it deletes the keys."""
    monkeypatch.setattr(Keyring, "forget", lambda self: None)


def _federation(tmp_path: Path, **schedule: Any) -> Path:
    return fv.make_federation(tmp_path / "f", fv.terms("mask", **schedule))


def _keyring(directory: Path, name: str = "ada") -> Keyring:
    """The keyring of a client that was restarted with the roster that is in its kit now."""
    kit = open_kit(directory / "clients" / name)
    transport: Any = None
    return Keyring(name, kit.signing_key(), kit.roster, transport, kit.directory / "state" / "keys")


def _epochs(directory: Path, name: str = "ada") -> list[int]:
    keys = directory / "clients" / name / "state" / "keys"
    return sorted(int(path.stem.removeprefix("epoch-")) for path in keys.glob("epoch-*.json"))


@pytest.mark.usefixtures("_stopped_before_the_keys_go")
def test_keys_rotate_after_the_agreed_number_of_rounds(founded: Any) -> None:
    directory, coordinator = founded("mask", rounds=5, rotate_key_every=2)
    assert fv.play(coordinator, fv.clients_of(directory)) == {}
    results: Any = coordinator.summary()["results"]
    assert len(results) == 5
    # Rounds 1 and 2, 3 and 4, 5; the two newest are kept.
    assert _epochs(directory) == [2, 3]


def test_a_server_that_keeps_a_key_in_use_is_refused_by_every_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pause for another key is as long as the patience.
    pauses: list[float] = []
    passing = SimpleNamespace(monotonic=lambda: time.monotonic() + 120.0 * len(pauses), sleep=pauses.append)
    monkeypatch.setattr(membership, "time", passing)
    directory = _federation(tmp_path, rounds=4, rotate_key_every=2)
    lazy = fv.coordinator_of(directory, rotate_key_every=1000)
    errors = fv.play(lazy, fv.clients_of(directory))
    assert set(errors) == set(fv.MEMBERS)
    for error in errors.values():
        assert isinstance(error, KeyExpiredError)
        assert "must not encrypt round 3: the key has served 2 of 2 rounds" in str(error)
    results: Any = lazy.summary()["results"]
    assert [result["round"] for result in results] == [1, 2]
    lazy.close()
    for name in fv.MEMBERS:
        counter = json.loads((directory / "clients" / name / "state" / "keys" / "counter.json").read_text())
        assert counter["round"] == 2, "nothing was encrypted for round 3"


def test_a_round_that_is_over_is_not_encrypted_again(founded: Any) -> None:
    directory, coordinator = founded("mask", rounds=3)
    pull = coordinator.pull

    def round_two_again(client: str, number: int) -> Any:
        answer = pull(client, number)
        return answer if answer is None else replace(answer, round=min(answer.round, 2))

    coordinator.pull = round_two_again  # a server that lies
    errors = fv.play(coordinator, fv.clients_of(directory))
    assert set(errors) == set(fv.MEMBERS)
    for error in errors.values():
        assert isinstance(error, StateError)
        assert "opened round 2 where round 3 was due" in str(error)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation after one round, before its clients' keys went."""
    directory = fv.make_federation(tmp_path_factory.mktemp("stopped") / "f", fv.terms("mask", 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keyring, "forget", lambda self: None)
        fv.finish(directory)
    return directory


@pytest.fixture
def after_one_round(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "stopped"))


def test_a_key_that_a_revoked_member_holds_encrypts_nothing_more(after_one_round: Path) -> None:
    assert _keyring(after_one_round).encryption_key(1, 2).epoch == 1
    consortium.revoke_member(after_one_round, "eva")
    keyring = _keyring(after_one_round)
    with pytest.raises(KeyExpiredError, match="members that hold the key no longer take part: eva"):
        keyring.encryption_key(1, 2)
    with pytest.raises(KeyExpiredError, match="no longer take part: eva"):
        keyring.agree(1, 2)
    assert keyring.key(1).epoch == 1, "what was encrypted before can still be read"


def test_a_key_of_a_member_with_a_new_identity_encrypts_nothing_more(after_one_round: Path) -> None:
    builders.enrol_member(after_one_round, "eva", replace=True)
    with pytest.raises(KeyExpiredError, match="agreed on under another roster"):
        _keyring(after_one_round).encryption_key(1, 2)


def test_a_key_does_not_serve_rounds_before_its_agreement_or_after_its_term(after_one_round: Path) -> None:
    keyring = _keyring(after_one_round)
    with pytest.raises(KeyExpiredError, match="agreed on for round 1 and later"):
        keyring.encryption_key(1, 0)
    assert keyring.encryption_key(1, 50).epoch == 1
    with pytest.raises(KeyExpiredError, match="has served 50 of 50 rounds"):
        keyring.encryption_key(1, 51)
    keyring.retire(1)
    with pytest.raises(KeyExpiredError, match="the server said that it was replaced"):
        keyring.encryption_key(1, 2)
    with pytest.raises(KeyAgreementError, match="was not part of key epoch 7"):
        keyring.encryption_key(7, 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored.pop("first_round"),
        lambda stored: stored.update(roster_hash="xy"),
        lambda stored: stored.update(key=None),
        lambda stored: stored.update(key=stored["key"].replace('"epoch": 1', '"epoch": 2')),
        lambda stored: stored.update(key=stored["key"].replace('"master": "', '"master": "00')),
    ],
)
def test_a_damaged_key_file_is_no_key(after_one_round: Path, damage: Any) -> None:
    path = after_one_round / "clients" / "ada" / "state" / "keys" / "epoch-0000000001.json"
    stored = json.loads(path.read_text())
    damage(stored)
    path.write_text(json.dumps(stored))
    keyring = _keyring(after_one_round)
    with pytest.raises(KeyAgreementError):
        keyring.encryption_key(1, 2)
    assert not keyring.has(1)


def _key_bytes(directory: Path) -> list[bytes]:
    stored = json.loads(next((directory / "clients/ada/state/keys").glob("epoch-*.json")).read_text())["key"]
    return [json.loads(stored)[name].encode() for name in ("master", "fingerprint")]


def test_no_client_holds_a_group_key_when_its_run_is_over(founded: Any) -> None:
    directory, coordinator = founded("mask", rounds=2)
    assert fv.play(coordinator, fv.clients_of(directory)) == {}
    for name in fv.MEMBERS:
        kept = directory / "clients" / name / "state" / "keys"
        assert [path.name for path in kept.iterdir()] == ["counter.json"]
    # Started once more, a client finds nothing to do and nothing missing.
    assert fv.play(coordinator, fv.clients_of(directory)) == {}
    with pytest.raises(KeyAgreementError, match="was not part of key epoch 1"):
        _keyring(directory).key(1)


def test_a_client_that_was_killed_before_it_deleted_its_keys_does_so_at_the_next_start(
    founded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, coordinator = founded("mask", rounds=2)
    with monkeypatch.context() as patch:
        patch.setattr(Keyring, "forget", lambda self: None)
        assert fv.play(coordinator, fv.clients_of(directory)) == {}
    keys = directory / "clients/ada/state/keys"
    secrets = _key_bytes(directory)
    # Half of a file, as a kill in the middle of writing leaves it, holds the key as well.
    half = keys / "epoch-0000000009.json.new"
    half.write_bytes(b"".join(secrets))
    assert fv.play(coordinator, fv.clients_of(directory)) == {}
    for path in (directory / "clients/ada/state").rglob("*"):
        if path.is_file():
            assert not any(secret in path.read_bytes() for secret in secrets), path


@pytest.mark.usefixtures("_stopped_before_the_keys_go")
@pytest.mark.parametrize("sent", [(), ("ada", "ben"), ("ada", "ben", "cid", "dee")])
def test_a_member_leaves_while_a_round_is_open(
    tmp_path: Path, sent: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """All are stopped with round 2 sealed, some uploads of it sent; eva is revoked; all start again."""
    caplog.set_level(logging.INFO)
    directory = _federation(tmp_path, rounds=3)
    coordinator = fv.coordinator_of(directory)
    lines = {
        name: (lambda line: fv.Dying(line, pull=3)) if name in sent else (lambda line: fv.Dying(line, push=2))
        for name in fv.MEMBERS
    }
    errors = fv.play(coordinator, fv.clients_of(directory), lines)
    assert all(isinstance(error, fv.Killed) for error in errors.values())
    coordinator.close()

    consortium.revoke_member(directory, "eva")
    coordinator = fv.coordinator_of(directory)
    staying = fv.clients_of(directory, fv.MEMBERS[:-1])
    assert fv.play(coordinator, staying) == {}
    results: Any = coordinator.summary()["results"]
    coordinator.close()
    assert "the roster has changed; a new group key is agreed on" in caplog.text
    assert [result["round"] for result in results] == [1, 2, 3]
    assert set(results[1]["uploaded"]) >= set(sent)
    assert results[2]["uploaded"] == sorted(staying)
    assert _keyring(directory).key(2).members == fv.MEMBERS[:-1]
    assert ("the adapter is sealed anew" in caplog.text) == (not sent)
